"""The interface between data and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

Batch = dict[str, torch.Tensor]
"""One micro-batch: CPU tensors, all of shape [micro_batch_size, length]: `tokens` int64; `labels` int64, already shifted
(labels[:, i] is the token after tokens[:, i]); `loss_mask` float32, 1 where the label counts; `position_ids` int64. Rows are padded
on the right, so that causal attention needs no mask.

With `lengths` int64 [micro_batch_size] the batch says how many places of each row are no padding; without it, all are.

In packed batches, `documents` int64 is the number of the document that a token belongs to, which increases along a row. A token
attends to its own document only, in which `position_ids` begin at 0; no label belongs to the next document. Either all batches of a
run have `documents`, or none."""


@dataclass(frozen=True)
class RowRules:
    """What the layout and the device ask of rows."""

    multiple: int = 1
    """Their lengths are multiples of it, and so is recipe.seq_length."""
    is_common: bool = False
    """Whether all micro-batches of a step, and all of a validation, have one length, on all ranks; otherwise each has its own."""
    unpackable: str = ""
    """The setting because of which they can't be packed; empty: they can."""


class DataModule(ABC):
    """Makes the batches of one run.

    The order of samples depends on the seed alone: not on the number of ranks, the micro-batch size, or where a run was resumed.
    Every rank makes its own DataModule and can compute the batches of any other.
    """

    vocab_size: int | None = None
    """Number of the model's token ids, set before `setup`, so that others are refused when they are read. None: unknown."""
    row_rules: RowRules = RowRules()
    """What rows must keep to; set before `setup`."""

    @abstractmethod
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        """Loads the data and tokenises it with the tokenizer in `tokenizer_folder`.

        Every rank calls it once, before any batch; it may be collective (`reading.read` is). Raises ConfigError.
        """

    @abstractmethod
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """Returns an endless iterator over one data-parallel rank's micro-batches, after `consumed_samples` samples of the run.

        global_batch_size / micro_batch_size / dp_size consecutive micro-batches make a step; over all ranks they hold exactly the
        step's samples. `row_rules` says whether all have the same length; none is longer than seq_length.
        """

    @abstractmethod
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        """Returns this rank's validation batches, [micro_batch_size, at most seq_length], the same number on every rank."""

    def digest(self) -> str:
        """Returns a digest of the training and validation rows, after `setup`. A run is not resumed if it has changed.

        Every rank calls it; it may be collective. Empty where the settings of `data` determine the rows, or where it isn't known.
        """
        return ""

    def epoch_rows(self) -> int | None:
        """Rows of an epoch, of which a step takes global_batch_size; after `setup`. None: the data has no end that is known."""
        return None

    def decided(self) -> dict[str, object]:
        """The settings that were left to the data, by name, as it decided: a resumed run must have the same."""
        return {}

    def left_out(self) -> str:
        """Returns one line on rows left out since training began; empty if there are none besides those in `describe`."""
        return ""

    def describe(self) -> str:
        """Returns one line for people: how many samples there are, and how many were cut or left out. Called after `setup`."""
        return type(self).__name__
