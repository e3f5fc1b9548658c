"""Shows the first row of a batch as text: spans that are learned, and spans that aren't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megabridge.data.module import Batch


@dataclass(frozen=True)
class Span:
    """Consecutive tokens that are all learned, or all not."""

    text: str
    tokens: int
    is_learned: bool
    begins_document: bool
    """Whether it begins a packed document other than the row's first."""


def spans(batch: Batch, tokenizer: Any) -> list[Span]:
    """Returns the first row of `batch` as it was before labels were shifted, without the padding at its end.

    The first token of each document is never learned, because nothing comes before it; the last one is only a label.
    """
    tokens, labels, mask = (batch[name][0].tolist() for name in ("tokens", "labels", "loss_mask"))
    documents = batch["documents"][0].tolist() if "documents" in batch else [0] * len(tokens)
    learned = [place for place, weight in enumerate(mask) if weight]
    last = documents[learned[-1]] if learned else 0
    found: list[Span] = []
    for document in range(last + 1):
        places = [place for place, number in enumerate(documents) if number == document]
        if document == last and "documents" not in batch:
            places = [place for place in places if not learned or place <= learned[-1]]
        if not places:
            continue
        ids = [tokens[places[0]], *(labels[place] for place in places)]
        flags = [False, *(bool(mask[place]) for place in places)]
        begin = 0
        for place in range(1, len(ids) + 1):
            if place == len(ids) or flags[place] != flags[begin]:
                text = tokenizer.decode(ids[begin:place], clean_up_tokenization_spaces=False)
                found.append(Span(text, place - begin, flags[begin], bool(document) and begin == 0))
                begin = place
    return found
