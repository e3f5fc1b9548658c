"""Computes log-likelihoods with the conventions of lm-evaluation-harness 0.4.13.

They are those of lm_eval/api/model.py and lm_eval/models/huggingface.py.
A text is encoded with the tokenizer's defaults. Without context, its first token follows the beginning-of-text token, or the
end-of-text token if there is none; that token is not scored, and not added twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megabridge.errors import ConfigError


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens, of which the last `scored` are scored, each given all tokens before it."""

    tokens: Sequence[int]
    scored: int


def prefix(tokenizer: Any) -> int:
    """Returns the token that a text without context follows. Raises ConfigError where the tokenizer has none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("the tokenizer must have a bos_token or an eos_token, which the first token of a text follows; set one.")


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of `text`, without the end-of-text token that some tokenizers append to every text."""
    tokens = list(tokenizer(text)["input_ids"])
    closed = tokens and tokens[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return tokens[:-1] if closed else tokens


def document(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a document after `prefix`; all but the first are to be scored."""
    tokens, first = encoded(tokenizer, text), prefix(tokenizer)
    return tokens if tokens[:1] == [first] else [first, *tokens]


def windows(tokens: Sequence[int], seq_length: int, stride: int) -> Iterator[ScoredTokens]:
    """Yields pieces that score every token but the first exactly once.

    The model gets at most `seq_length` tokens at once. The first piece scores as many, each further one the next `stride` tokens
    (the last one fewer) with as much context as fits.
    """
    done, total = 1, len(tokens)
    while done < total:
        end = min(total, done + (seq_length if done == 1 else stride))
        yield ScoredTokens(tokens[max(0, end - 1 - seq_length) : end], end - done)
        done = end


def continuation(tokenizer: Any, prompt: str, text: str, *, longest: int) -> ScoredTokens:
    """Returns the tokens of `prompt` and `text`, with those of `text` scored.

    Spaces at the end of the prompt count as part of the text. Both are encoded together; the text begins after as many tokens as
    the prompt alone has. Inputs longer than `longest` tokens are cut off on the left.
    """
    kept = prompt.rstrip()
    whole = encoded(tokenizer, prompt + text)
    if kept:
        before = len(encoded(tokenizer, kept))
    else:
        whole, before = document(tokenizer, prompt + text), 1
    tokens = whole[-(longest + 1) :]
    return ScoredTokens(tokens, min(len(whole) - before, len(tokens) - 1))


def log_likelihoods(model: Any, pieces: Sequence[ScoredTokens], *, batch_size: int) -> list[float]:
    """Returns the sum of natural log-probabilities over each piece's scored tokens, in the order of `pieces`.

    Softmax in float32, sums in float64. Pieces of similar length share a batch; shorter ones are padded on the right, which causal
    attention doesn't see.
    """
    totals = [0.0] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda place: -len(pieces[place].tokens))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(pieces[batch[0]].tokens) - 1
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(inputs)
        for row, place in enumerate(batch):
            given = pieces[place].tokens[:-1]
            inputs[row, : len(given)] = torch.tensor(given, dtype=torch.long)
            mask[row, : len(given)] = 1
        with torch.no_grad():
            logits = model(input_ids=inputs.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        for row, place in enumerate(batch):
            totals[place] = _score(logits[row], pieces[place])
    return totals


def _score(logits: torch.Tensor, piece: ScoredTokens) -> float:
    """Returns the log-likelihood of one piece from its row of logits [longest, vocabulary]."""
    if piece.scored < 1:
        return 0.0
    end = len(piece.tokens) - 1
    chosen = torch.tensor(piece.tokens[-piece.scored :], dtype=torch.long, device=logits.device)
    found = logits[end - piece.scored : end].float().log_softmax(-1).gather(1, chosen[:, None])
    return float(found.double().sum())
