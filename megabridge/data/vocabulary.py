"""Token ids against the model's vocabulary. An id beyond it has no row in the embedding: under tensor parallelism no rank has one,
and zeros would stand for it without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

from megabridge.errors import ConfigError

IGNORED: Final = -100
"""What a label may be whose loss doesn't count, as in transformers."""


def check_ids(ids: Sequence[int], size: int | None, where: str) -> None:
    """Raises ConfigError, which begins with `where`, unless all `ids` are ids of a vocabulary of `size` (None: not known)."""
    if size is not None and len(ids) and not (min(ids) >= 0 and max(ids) < size):
        raise _beyond(next(one for one in ids if not 0 <= one < size), size, where)


def check_tokens(tokens: Tensor, size: int, where: str) -> None:
    """The same of a tensor of ids; `where` is followed by the place in it. One reduction where all is well."""
    if not tokens.numel():
        return
    least, most = tokens.aminmax()
    if int(least) < 0 or int(most) >= size:
        _refuse(tokens, (tokens < 0) | (tokens >= size), size, where)


def check_batch(batch: Mapping[str, Tensor], size: int, where: str) -> None:
    """`check_tokens` of a batch's tokens and labels; a label that has no loss may be IGNORED."""
    check_tokens(batch["tokens"], size, f"{where}: tokens")
    labels = batch["labels"]
    least, most = labels.aminmax()
    if int(least) < 0 or int(most) >= size:
        is_ignored = (labels == IGNORED) & (batch["loss_mask"] == 0)
        _refuse(labels, ((labels < 0) | (labels >= size)) & ~is_ignored, size, f"{where}: labels")


def _refuse(ids: Tensor, is_beyond: Tensor, size: int, where: str) -> None:
    """Raises ConfigError for the first one, if any."""
    places = is_beyond.nonzero()
    if len(places):
        place = places[0].tolist()
        raise _beyond(int(ids[tuple(place)]), size, f"{where}{place}")


def _beyond(number: int, size: int, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: token id {number} is none of the model's, which has vocab_size={size} of them, from 0; use the model's own "
        "tokenizer for the data, or a model with a larger vocabulary."
    )
