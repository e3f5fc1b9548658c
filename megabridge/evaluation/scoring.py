"""Log-likelihoods of tokens, with the conventions of lm-evaluation-harness (lm_eval 0.4.13: api/model.py, models/huggingface.py).

A text is encoded as the tokenizer does by default. Where nothing stands before it, its first token follows the tokenizer's
beginning-of-text token, or the end-of-text token where there is none; that one is not scored, and not put twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megabridge.errors import ConfigError


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens, of which the last `scored` have their likelihood taken, each given all before it."""

    tokens: Sequence[int]
    scored: int


def prefix(tokenizer: Any) -> int:
    """The token that a text without context follows. Raises ConfigError where the tokenizer has none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("the tokenizer must have a bos_token or an eos_token, which the first token of a text follows; set one.")


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text`, without an end-of-text token that some tokenizers close every text with."""
    tokens = list(tokenizer(text)["input_ids"])
    closed = tokens and tokens[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return tokens[:-1] if closed else tokens


def document(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a document after the one it follows; all but the first of them are to be scored."""
    tokens, first = encoded(tokenizer, text), prefix(tokenizer)
    return tokens if tokens[:1] == [first] else [first, *tokens]


def windows(tokens: Sequence[int], seq_length: int, stride: int) -> Iterator[ScoredTokens]:
    """Pieces that score every token but the first exactly once.

    The model is given at most `seq_length` tokens at once. The first piece scores as many, each further one the next `stride`
    with all the context that fits; the last one has fewer to score and as much context.
    """
    done, total = 1, len(tokens)
    while done < total:
        end = min(total, done + (seq_length if done == 1 else stride))
        yield ScoredTokens(tokens[max(0, end - 1 - seq_length) : end], end - done)
        done = end


def continuation(tokenizer: Any, prompt: str, text: str, *, longest: int) -> ScoredTokens:
    """`text` after `prompt`, of which the tokens of `text` are scored.

    Spaces at the end of the prompt belong to the text. Both are encoded as one, and cut after as many tokens as the prompt alone
    has. What the model can't be given at once, `longest` tokens, is cut off on the left.
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
    """The sum of natural log-probabilities over each piece's scored tokens, in the order of `pieces`.

    Softmax in float32, sums in float64. Pieces of like length share a batch; the shorter ones are filled up on the right, where
    causal attention doesn't see it.
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
    """The log-likelihood of one piece from its row of logits [longest, vocabulary]."""
    if piece.scored < 1:
        return 0.0
    end = len(piece.tokens) - 1
    chosen = torch.tensor(piece.tokens[-piece.scored :], dtype=torch.long, device=logits.device)
    found = logits[end - piece.scored : end].float().log_softmax(-1).gather(1, chosen[:, None])
    return float(found.double().sum())
