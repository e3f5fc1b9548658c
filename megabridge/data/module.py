"""The interface between data and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch

Batch = dict[str, torch.Tensor]
"""One micro-batch: CPU tensors, all of shape [micro_batch_size, length]: `tokens` int64; `labels` int64, already shifted
(labels[:, i] is the token after tokens[:, i]); `loss_mask` float32, 1 where the label counts; `position_ids` int64. Rows are padded
on the right, so that causal attention needs no mask.

In packed batches, `documents` int64 is the number of the document that a token belongs to, which increases along a row. A token
attends to its own document only, in which `position_ids` begin at 0; no label belongs to the next document. Either all batches of a
run have `documents`, or none."""


class DataModule(ABC):
    """Makes the batches of one run.

    The order of samples depends on the seed alone: not on the number of ranks, the micro-batch size, or where a run was resumed.
    Every rank makes its own DataModule and can compute the batches of any other.
    """

    vocab_size: int | None = None
    """Number of the model's token ids, set before `setup`, so that others are refused when they are read. None: unknown."""

    @abstractmethod
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        """Loads the data and tokenises it with the tokenizer in `tokenizer_folder`.

        Every rank calls it once, before any batch; it may be collective (`reading.read` is). Raises ConfigError.
        """

    @abstractmethod
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """Returns an endless iterator over one data-parallel rank's micro-batches, after `consumed_samples` samples of the run.

        global_batch_size / micro_batch_size / dp_size consecutive micro-batches make a step; over all ranks they hold exactly the
        step's samples, and all have the same length.
        """

    @abstractmethod
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        """Returns this rank's validation batches, [micro_batch_size, seq_length], the same number on every rank."""

    def digest(self) -> str:
        """Returns a digest of the training and validation rows, after `setup`. A run is not resumed if it has changed.

        Every rank calls it; it may be collective. Empty where the settings of `data` determine the rows, or where it isn't known.
        """
        return ""

    def left_out(self) -> str:
        """Returns one line on rows left out since training began; empty if there are none besides those in `describe`."""
        return ""

    def describe(self) -> str:
        """Returns one line for people: how many samples there are, and how many were cut or left out. Called after `setup`."""
        return type(self).__name__
