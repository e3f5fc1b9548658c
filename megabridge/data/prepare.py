"""Converts text, JSONL and parquet to indexed data in several processes. The result does not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from megabridge.data import indexed, sources
from megabridge.data.invalid_rows import EMPTY, ENCODING, FORMAT, MISSING, BadRow, Tally
from megabridge.data.text import TextEncoder
from megabridge.data.vocabulary import check_ids
from megabridge.errors import ConfigError, MegabridgeError
from megabridge.storage import data_files, regular_files

RANGE: Final = 8 << 20
"""Bytes of a file of lines that one task tokenises."""

Advance = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""


@dataclass(frozen=True)
class Part:
    """The input of one task: the lines that begin in a range of bytes, a row group of parquet, or a whole text file."""

    file: Path
    begin: int
    end: int
    group: int | None = None


@dataclass(frozen=True)
class Rules:
    """Rules for dividing files into rows, and for making a document of a row."""

    tokenizer: Path
    column: str = "text"
    text_lines: bool = False
    """Whether each line of a plain text file is a document, and not the whole file."""
    append_end: bool = True
    """Whether the tokenizer's end-of-text token closes a document."""
    vocab_size: int | None = None
    """Number of token ids of the model that the data is for. None: any."""


@dataclass(frozen=True)
class Prepared:
    """Counts of what was written and left out."""

    documents: int
    tokens: int
    tally: Tally


def prepare(
    paths: Sequence[str], output: str | Path, rules: Rules, *, workers: int, max_bad_share: float, advance: Advance
) -> Prepared:
    """Writes `output`.bin and .idx from the files that `paths` name, with documents in their order.

    Both files appear only when they are complete. Raises ConfigError where no file is named, the output exists, too many rows are
    bad, or a token is not in the model's vocabulary.
    """
    places = data_files.indexed_files(output)
    for place in places:
        if place.exists():
            raise ConfigError(f"{place} exists; remove it, or set another prepare.output.")
    found: list[Path] = []
    for path in paths:
        files = data_files.local_files(path)
        if files is None:
            raise ConfigError(
                f"prepare.paths: {path} names no {', '.join(data_files.SUFFIXES)} file; data sets of the hub are for "
                "data=streaming."
            )
        found += files
    if not found:
        raise ConfigError("prepare.paths names no file; set it, e.g. prepare.paths=[corpus.jsonl].")
    parts = [part for file in found for part in _parts(file, rules)]
    places[0].parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{places[0].stem}-", dir=places[0].parent) as work:
        unfinished = Path(work) / "all.bin", Path(work) / "all.idx"
        prepared, lengths = _tokenise(parts, unfinished[0], rules, workers, advance)
        prepared.tally.judge(max_bad_share, f"prepare.paths={','.join(paths)}", "prepare.max_bad_share")
        indexed.write_index(unfinished[1], lengths, _dtype(TextEncoder(rules.tokenizer)))
        for source, place in zip(unfinished, places, strict=True):
            source.replace(place)
    return prepared


def _parts(file: Path, rules: Rules) -> Iterator[Part]:
    size = file.stat().st_size
    if file.suffix == ".parquet":
        sizes = sources.group_bytes(file)
        for number, (begin, end) in enumerate(zip(accumulate([0, *sizes]), accumulate(sizes), strict=False)):
            yield Part(file, begin, end, number)
    elif file.suffix == ".txt" and not rules.text_lines:
        yield Part(file, 0, size)
    else:
        for begin in range(0, size, RANGE):
            yield Part(file, begin, min(begin + RANGE, size))


def _tokenise(
    parts: Sequence[Part], output: Path, rules: Rules, workers: int, advance: Advance
) -> tuple[Prepared, np.ndarray[Any, Any]]:
    """Writes all documents' tokens to `output`, part by part. Returns the counts and the documents' lengths."""
    tally, lengths, done = Tally(), [np.zeros(0, np.int64)], 0
    total = sum(part.end - part.begin for part in parts)
    tasks = [(part, output.parent / f"{number}.part") for number, part in enumerate(parts)]
    with output.open("wb") as stream:
        for (part, piece), (counts, own) in zip(tasks, _results(tasks, rules, workers), strict=True):
            _append(stream, piece)
            lengths.append(counts)
            tally.add(own)
            done += part.end - part.begin
            advance(done, total)
        stream.flush()
        os.fsync(stream.fileno())
    whole = np.concatenate(lengths)
    return Prepared(len(whole), int(whole.sum()), tally), whole


def _results(tasks: Sequence[tuple[Part, Path]], rules: Rules, workers: int) -> Iterator[tuple[np.ndarray[Any, Any], Tally]]:
    """Yields the results of `tasks` in order; a single worker is this process."""
    if workers == 1 or len(tasks) == 1:
        worker = _Worker(rules)
        yield from (worker.run(*task) for task in tasks)
        return
    # A server that has imported the tokenizer forks the workers: this process may have threads, which make forking unsafe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (rules,)) as pool:
        try:
            yield from pool.map(_run, *zip(*tasks, strict=True))
        except BrokenProcessPool as error:
            raise MegabridgeError(
                f"one of the {workers} processes that tokenise was ended (out of memory, or killed from outside); set "
                "prepare.workers to fewer."
            ) from error


def _dtype(encoder: TextEncoder) -> type[np.generic]:
    """Returns the dtype that holds every id of the tokenizer, whose ids may have gaps."""
    return indexed.token_dtype(max(encoder.tokenizer.get_vocab().values(), default=0) + 1)


_worker: _Worker | None = None
"""The worker of a process in the pool."""


def _start(rules: Rules) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process
    _worker = _Worker(rules)


def _run(part: Part, output: Path) -> tuple[np.ndarray[Any, Any], Tally]:
    assert _worker is not None  # _start has run
    return _worker.run(part, output)


class _Worker:
    """Tokenises parts."""

    def __init__(self, rules: Rules) -> None:
        self._rules, self._encoder = rules, TextEncoder(rules.tokenizer)
        self._dtype = _dtype(self._encoder)

    def run(self, part: Part, output: Path) -> tuple[np.ndarray[Any, Any], Tally]:
        """Writes the tokens of a part's documents to `output`; returns their lengths, and the tally of its rows."""
        tally, lengths = Tally(), []
        with output.open("wb") as stream:
            for where, row in self._rows(part):
                try:
                    tokens = self._tokens(row)
                except BadRow as bad:
                    tally.leave_out(where, bad)
                    continue
                check_ids(tokens, self._rules.vocab_size, where)
                tally.good += 1
                stream.write(np.asarray(tokens, self._dtype).tobytes())
                lengths.append(len(tokens))
        return np.asarray(lengths, np.int64), tally

    def _rows(self, part: Part) -> Iterator[sources.Found]:
        """Yields the rows of a part. Plain text has no columns: its rows have the text in the configured one."""
        if part.group is not None:
            yield from sources.read_parquet(part.file, [part.group], [self._rules.column])
        elif part.file.suffix == ".txt" and not self._rules.text_lines:
            with regular_files.opened(part.file) as text:
                yield str(part.file), self._plain(text.read())
        else:
            take = self._plain if part.file.suffix == ".txt" else sources.parse
            yield from ((f"{part.file}, byte {place}", take(line)) for place, line in _lines(part) if line)

    def _plain(self, content: bytes) -> Mapping[str, Any] | BadRow:
        row = sources.decode(content)
        return row if isinstance(row, BadRow) else {self._rules.column: row[sources.TEXT]}

    def _tokens(self, row: Any) -> list[int]:
        if isinstance(row, BadRow):
            raise row
        column = self._rules.column
        text = row.get(column)
        if text is None:
            raise BadRow(MISSING, f"{column}; the row has {', '.join(row) or 'nothing'}")
        if not isinstance(text, str):
            raise BadRow(FORMAT, f"{column} must be text, not {type(text).__name__}")
        if not text.strip():
            raise BadRow(EMPTY, f"{column} has no text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(ENCODING, f"{column}: {error}") from error
        tokens = self._encoder.document(text) if self._rules.append_end else list(self._encoder.tokenizer(text)["input_ids"])
        if not tokens:
            raise BadRow(EMPTY, f"{column} has no tokens")
        return tokens


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Yields (place in the file, line without its end) of the lines that begin in the part's bytes."""
    with regular_files.opened(part.file) as stream:
        if part.begin:
            stream.seek(part.begin - 1)
            stream.readline()  # the rest of a line that began before, or only its end
        while (place := stream.tell()) < part.end:
            yield place, stream.readline().strip()


def _append(stream: BinaryIO, piece: Path) -> None:
    with piece.open("rb") as content:
        while block := content.read(RANGE):
            stream.write(block)
    piece.unlink()
