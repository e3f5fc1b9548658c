"""Checks token ids against the model's vocabulary.

An id beyond it has no row in the embedding: under tensor parallelism no rank has one, and it would silently be embedded as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

from megabridge.errors import ConfigError

IGNORED: Final = -100
"""Value of a label without loss, as in transformers."""


def check_ids(ids: Sequence[int], size: int | None, where: str) -> None:
    """Raises a ConfigError beginning with `where` unless all `ids` are in a vocabulary of `size` ids (None: unknown)."""
    if size is not None and len(ids) and not (min(ids) >= 0 and max(ids) < size):
        raise _beyond(next(one for one in ids if not 0 <= one < size), size, where)


def check_tokens(tokens: Tensor, size: int, where: str) -> None:
    """Like `check_ids`, for a tensor of ids; the error gives the place in it after `where`. A valid tensor costs one reduction."""
    if not tokens.numel():
        return
    least, most = tokens.aminmax()
    if int(least) < 0 or int(most) >= size:
        _refuse(tokens, (tokens < 0) | (tokens >= size), size, where)


def check_batch(batch: Mapping[str, Tensor], size: int, where: str) -> None:
    """Checks a batch's tokens and labels as `check_tokens` does; a label without loss may be IGNORED."""
    check_tokens(batch["tokens"], size, f"{where}: tokens")
    labels = batch["labels"]
    least, most = labels.aminmax()
    if int(least) < 0 or int(most) >= size:
        is_ignored = (labels == IGNORED) & (batch["loss_mask"] == 0)
        _refuse(labels, ((labels < 0) | (labels >= size)) & ~is_ignored, size, f"{where}: labels")


def _refuse(ids: Tensor, is_beyond: Tensor, size: int, where: str) -> None:
    """Raises ConfigError for the first id marked in `is_beyond`, if any."""
    places = is_beyond.nonzero()
    if len(places):
        place = places[0].tolist()
        raise _beyond(int(ids[tuple(place)]), size, f"{where}{place}")


def _beyond(number: int, size: int, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: token id {number} must be below the model's vocab_size={size}, and not negative; use the model's own "
        "tokenizer for the data, or a model with a larger vocabulary."
    )
