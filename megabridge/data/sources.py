"""Iterates over the rows of local files (JSONL, parquet, plain text) and of data sets that `datasets` loads.

A row that can't be read is replaced by a BadRow, so that the caller can count it and go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megabridge.data.invalid_rows import ENCODING, FORMAT, BadRow
from megabridge.errors import ConfigError
from megabridge.storage import regular_files
from megabridge.storage.data_files import local_files

type Found = tuple[str, Mapping[str, Any] | BadRow]
"""(place, row): the place is file:line or file:row."""

TEXT: Final = "text"
"""Column of a plain-text row that holds the text."""


def read(file: Path) -> Iterator[Found]:
    """Yields the rows of one file. A file of plain text is one row."""
    if file.suffix == ".parquet":
        yield from read_parquet(file)
    elif file.suffix == ".txt":
        with regular_files.opened(file) as text:
            yield str(file), decode(text.read())
    else:
        with regular_files.opened(file) as lines:
            yield from ((f"{file}:{number}", parse(line)) for number, line in enumerate(lines, 1) if line.strip())


def decode(content: bytes) -> Mapping[str, Any] | BadRow:
    """Parses a row of plain text."""
    try:
        return {TEXT: content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return BadRow(ENCODING, _encoding(content, error))


def _encoding(content: bytes, error: UnicodeDecodeError) -> str:
    return "UTF-16; convert the file to UTF-8" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else str(error)


def parse(line: bytes) -> Mapping[str, Any] | BadRow:
    """Parses a row of JSONL."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return BadRow(ENCODING, _encoding(line, error))
    except (ValueError, RecursionError) as error:
        return BadRow(FORMAT, f"not JSON: {error}")
    return row if isinstance(row, dict) else BadRow(FORMAT, f"must be a JSON object, not {type(row).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:100]!r} is given twice")
    return found


def read_parquet(file: Path, groups: Sequence[int] | None = None, columns: Sequence[str] | None = None) -> Iterator[Found]:
    """Yields the rows of a parquet file, or of some of its row groups. Raises ConfigError for a file that isn't parquet."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            wanted = None if columns is None else [name for name in columns if name in opened.schema_arrow.names]
            for batch in opened.iter_batches(1024, row_groups=groups, columns=wanted):
                for row in _python_rows(batch):
                    yield f"{file}:{'' if groups is None else f'group {groups[0]} '}row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file} can't be read as parquet: {error}; write it again.") from error


def _python_rows(batch: Any) -> Iterator[Mapping[str, Any] | BadRow]:
    """Yields the rows of a batch, one by one if a text in it isn't UTF-8, which pyarrow checks only here."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for place in range(batch.num_rows):
        try:
            yield batch.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRow(ENCODING, str(error))


def load(path: str, *, name: str | None, split: str | None, revision: str | None, streaming: bool) -> Any:
    """Loads `path`, a hub id or a folder, with `datasets`. Raises ConfigError."""
    import datasets

    try:
        found = datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # anything that the data set's files, the network and the hub can raise
        where = f"data.path={path} name={name} split={split}"
        raise ConfigError(f"{where} can't be loaded: {type(error).__name__}: {error}; check id, name, split and access.") from error
    if isinstance(found, dict):
        raise ConfigError(f"data.path={path} has the splits {', '.join(found)}; set data.split to one of them.")
    return found


def readable(path: str, stream: Iterable[Any]) -> Iterator[Any]:
    """Yields the rows of a stream. Raises ConfigError where it can't be read any further."""
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # anything that a builder of `datasets`, the network and the hub can raise
            raise ConfigError(
                f"data.path={path} can't be read: {type(error).__name__}: {error}; correct the file it names."
            ) from error
        yield row


def stream_files(files: Sequence[Path]) -> Any:
    """Opens local files as a stream of `datasets`. Raises ConfigError for files of several kinds."""
    import datasets

    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"{files[0].parent} has files of several kinds, {', '.join(sorted(kinds))}; name those of one.")
    builder = {".parquet": "parquet", ".txt": "text"}.get(kinds.pop(), "json")
    # A text file is one document, as in `read`.
    settings = {"sample_by": "document"} if builder == "text" else {}
    names = [str(file) for file in files]
    return datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **settings)


def rows(path: str, *, name: str | None = None, split: str | None = None, revision: str | None = None) -> Iterator[Found]:
    """Yields all rows of `path`: of local files, or of a data set that `datasets` loads. Raises ConfigError if it is neither."""
    files = local_files(path)
    if files is None:
        split = "train" if split is None else split
        loaded = load(path, name=name, split=split, revision=revision, streaming=False)
        yield from ((f"{path}:{split} row {number}", row) for number, row in enumerate(loaded))
        return
    given = [key for key, value in (("name", name), ("split", split), ("revision", revision)) if value is not None]
    if given:
        raise ConfigError(f"data.{given[0]} is for data sets of the hub, but {path} is a local file; remove it.")
    for file in files:
        yield from read(file)


def group_bytes(file: Path) -> list[int]:
    """Returns the bytes of each row group of a parquet file. Raises ConfigError for a file that isn't parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
            return [group.total_byte_size for group in groups]
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file} can't be read as parquet: {error}; write it again.") from error
