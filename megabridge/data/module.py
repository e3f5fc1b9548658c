"""The contract between data and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

Batch = dict[str, torch.Tensor]
"""One micro-batch, CPU tensors of one shape [micro_batch_size, length]: `tokens` int64; `labels` int64, already shifted
(labels[:, i] is the token after tokens[:, i]); `loss_mask` float32, 1 where the label counts; `position_ids` int64. Rows are padded
on the right, so that causal attention needs no mask.

With `lengths` int64 [micro_batch_size] the batch says how many places of each row are no padding; without it, all are.

With `documents` int64 rows are packed: the number of the document that a token belongs to, which rises along a row. A token
sees its own document only, in which `position_ids` begin at 0; no label is the next document's. All batches of a run have it,
or none."""


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

    The order of samples depends on the seed and on nothing else: not on the number of ranks, not on the micro-batch size, not on
    where a run was resumed. Every rank makes its own DataModule and can compute the batches of any other.
    """

    vocab_size: int | None = None
    """How many token ids the model has; set before `setup`, so that others are refused as they are read. None: not known."""
    row_rules: RowRules = RowRules()
    """What rows must keep to; set before `setup`."""

    @abstractmethod
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        """Loads and tokenises with the tokenizer in `tokenizer_folder`. Every rank calls it, once, before any batch; it may be
        collective (`reading.read` is). Raises ConfigError."""

    @abstractmethod
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """Micro-batches of one data-parallel rank, endless, beginning after `consumed_samples` samples of the whole run.

        global_batch_size / micro_batch_size / dp_size consecutive ones make a step; over all ranks they hold exactly the step's
        samples. `row_rules` says whether they must be equally long; none is longer than seq_length.
        """

    @abstractmethod
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's part of the validation samples, in batches of [micro_batch_size, at most seq_length], on each as many."""

    def digest(self) -> str:
        """A digest of the rows to learn from and to validate on, after `setup`: a run is not resumed where it has changed.

        Every rank calls it; it may be collective. "" where the settings of `data` say it all, and where nothing is known.
        """
        return ""

    def epoch_rows(self) -> int | None:
        """Rows of an epoch, of which a step takes global_batch_size; after `setup`. None: the data has no end that is known."""
        return None

    def decided(self) -> dict[str, object]:
        """The settings that were left to the data, by name, as it decided: a resumed run must have the same."""
        return {}

    def left_out(self) -> str:
        """One line on what was left out since training began; empty when nothing was beyond what `describe` says."""
        return ""

    def describe(self) -> str:
        """One line for people: how many samples, and how many were cut or left out. After `setup`."""
        return type(self).__name__
