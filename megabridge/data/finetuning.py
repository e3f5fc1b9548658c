"""Fine-tuning data: conversations, prompts with completions, or plain text, from local files or a data set of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, override

from megabridge.data import digests, sources
from megabridge.data.batches import OVERLONG, Batching, Order, Overlong, PadTo, Sample
from megabridge.data.examples import Examples
from megabridge.data.invalid_rows import check_share
from megabridge.data.module import Batch, DataModule
from megabridge.data.packing import filling
from megabridge.data.reading import Read, read
from megabridge.errors import ConfigError, listed
from megabridge.storage import data_files


class Finetuning(DataModule):
    """Data with one sample per row, of which the assistant's messages, the completion, or all of a plain text is learned.

    Rows are held out for validation by their content, so that the same rows are held out whatever their order, and duplicates are
    never on both sides; with `validation_path` or `validation_split` the validation rows come from there.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        schema: str = "auto",
        columns: Mapping[str, str] | None = None,
        prompt_as_chat: bool = False,
        validation_path: str | None = None,
        validation_split: str | None = None,
        validation_share: float = 0.05,
        overlong: Overlong = "drop",
        packing: bool | Literal["auto"] = "auto",
        group_by_length: bool = False,
        pad_to: PadTo = "longest",
        max_bad_share: float = 0.01,
        template_arguments: Mapping[str, object] | None = None,
    ) -> None:
        """`name`, `split` and `revision` are arguments of `datasets`; see docs/data.md for the rest. Raises ConfigError."""
        problems = []
        if overlong not in OVERLONG:
            problems.append(f"data.overlong={overlong!r} must be one of {', '.join(OVERLONG)}.")
        if not 0 <= validation_share < 1:
            problems.append(f"data.validation_share={validation_share} must be at least 0 and less than 1, e.g. 0.05.")
        if validation_path is not None and validation_split is not None and data_files.local_files(validation_path):
            problems.append("data.validation_split is for data sets of the hub, but data.validation_path is local; remove one.")
        if packing not in (True, False, "auto"):
            problems.append(f"data.packing={packing!r} must be auto, true or false.")
        if problems:
            raise ConfigError(listed(problems))
        check_share(max_bad_share)
        self._source = {"path": path, "name": name, "split": split, "revision": revision}
        self._examples = {
            "schema": schema,
            "columns": dict(columns or {}),
            "prompt_as_chat": prompt_as_chat,
            "template_arguments": template_arguments,
        }
        self._validation = (validation_path, validation_split)
        self._share, self._overlong, self._max_bad_share = validation_share, overlong, max_bad_share
        self._packing, self._filling = packing, {"group_by_length": group_by_length, "pad_to": pad_to}

    @override
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        examples = Examples(tokenizer_folder, vocab_size=self.vocab_size, **self._examples)  # type: ignore[arg-type]  # each has its own type
        self._seed = seed
        self._reads = {"train": self._read(examples, seq_length, self._source, f"data.path={self._source['path']}")}
        path, split = self._validation
        train = self._reads["train"]
        if path is None and split is None:
            self.train, self.validation = self._held_out(train)
        else:
            source = {**self._source, "split": split} if path is None else {"path": path, "split": split}
            named = "data.validation_split" if path is None else "data.validation_path"
            self._reads["validation"] = self._read(examples, seq_length, source, f"{named}={split if path is None else path}")
            self.train, self.validation = train.samples, self._reads["validation"].samples
        self._schema = examples.schema
        sizes = (seq_length, micro_batch_size, global_batch_size, examples.pad_token)
        padded = Batching(*sizes, **self._filling, row_rules=self.row_rules)  # type: ignore[arg-type]  # each has its own type
        packs, self._decision = self._decided(padded) if self._packing == "auto" else (bool(self._packing), "")
        self.batching = replace(padded, packing=packs)
        self._rows = len(self.batching.rows(self.train, seed))

    def _decided(self, padded: Batching) -> tuple[bool, str]:
        """Whether rows are packed, and why."""
        if (chosen := [name for name, value in self._filling.items() if value not in ("longest", False)]) or not self.train:
            return False, f"padded, because of data.{chosen[0]}" if chosen else ""
        if self.row_rules.unpackable:
            return False, f"padded: {self.row_rules.unpackable} has no packed rows"
        order = Order(len(self.train), self._seed)
        lengths = [sample.positions for sample in self.train]
        places = [order.sample(place) for place in range(len(lengths))]
        found = filling(lengths, places, padded.seq_length, self._seed, padded.global_batch_size)
        return found.pays, found.describe()

    def _read(self, examples: Examples, seq_length: int, source: Mapping[str, str | None], what: str) -> Read:
        """Reads and tokenises all rows of `source`; errors call it `what`. Collective. Raises ConfigError for too many bad rows."""
        rows = sources.rows(**source)  # type: ignore[arg-type]  # a path is never None
        found = read(rows, examples, seq_length=seq_length, overlong=self._overlong, what=what)
        examples.check_known(what)
        found.tally.judge(self._max_bad_share, what)
        return found

    def _held_out(self, found: Read) -> tuple[list[Sample], list[Sample]]:
        """Returns (train, validation) samples: the share with the lowest digests is held out, duplicates together."""
        ranked = sorted(set(found.digests))
        count = round(len(ranked) * self._share)
        if self._share and len(ranked) > 1:
            count = max(1, count)
        held_out = set(ranked[:count])
        pairs = list(zip(found.samples, found.digests, strict=True))
        train = [sample for sample, digest in pairs if digest not in held_out]
        return train, [sample for sample, digest in pairs if digest in held_out]

    @override
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        return self.batching.train(self.train, consumed_samples, seed=self._seed, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        return self.batching.validation(self.validation, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def epoch_rows(self) -> int:
        return self._rows

    @override
    def decided(self) -> dict[str, object]:
        return {"data.packing": self.batching.packing}

    @override
    def digest(self) -> str:
        return digests.of_samples(self.train, self.validation)

    @override
    def describe(self) -> str:
        parts = [f"{self._source['path']} ({self._schema})"]
        for name, samples in (("train", self.train), ("validation", self.validation)):
            tokens = sum(len(sample.tokens) for sample in samples)
            count = self._rows if name == "train" else len(self.batching.rows(samples, 0))
            rows = f" in {count} packed rows" if self.batching.packing else ""
            parts.append(f"{name} {len(samples)} samples, {tokens} tokens{rows}")
        parts += [f"data.packing=auto: {self._decision}"] if self._decision else []
        for found in self._reads.values():
            parts += [f"{found.truncated} truncated"] if found.truncated else []
            parts += [found.tally.describe()] if found.tally.bad else []
        return "; ".join(parts)
