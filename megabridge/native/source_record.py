"""SourceRecord: facts of the imported Hugging Face weights that a native checkpoint keeps for later exports."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import torch

from megabridge.errors import CheckpointError
from megabridge.hf.dtypes import Casts, holds
from megabridge.hf.dtypes import name as _name
from megabridge.hf.safetensors_format import TensorInfo, parse_json
from megabridge.storage import regular_files

FILE: Final = "megabridge_source.json"
FORMAT: Final = 1
_FILE: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class SourceRecord:
    """Facts of the imported files that the parameters don't have.

    `dtype` is that of most tensors, `other_dtypes` those of the rest; `aliases` are copies of tied tensors in the files; `left_out`
    are unused tensors, and parameters without a tensor, because the import was not strict. `rounded` are tensors that were since
    held in a parameter whose dtype can't hold their values, with that dtype. `files` are the safetensors files and the tensors in
    each, in order; empty for files of another kind than an export writes (pickled or quantised).
    """

    dtype: torch.dtype
    other_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    aliases: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()
    rounded: Mapping[str, torch.dtype] = field(default_factory=dict)
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo], *, aliases: Iterable[str], left_out: Iterable[str] = ()) -> Self:
        """Makes the record of a folder's tensors (at least one)."""
        most = Counter(info.dtype for info in infos.values()).most_common(1)[0][0]
        others = {name: info.dtype for name, info in infos.items() if info.dtype != most}
        return cls(most, others, frozenset(aliases), tuple(left_out), files=_files(infos.values()))

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The source's dtype of each of `names`."""
        return {name: self.other_dtypes.get(name, self.dtype) for name in names}

    def held_in(self, held: Mapping[str, torch.dtype]) -> Self:
        """Returns the record after the weights were held in parameters of these dtypes, by tensor."""
        before = self.dtypes(held)
        rounded = dict(self.rounded)
        for name, dtype in held.items():
            if not holds(dtype, before[name]) and not (name in rounded and holds(dtype, rounded[name])):
                rounded[name] = dtype
        return replace(self, rounded=rounded)

    def files_of(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, list[str]]:
        """The source's files, for an export of exactly the source's tensors in their dtypes; empty for other exports."""
        found = {file: [name for name in names if name in dtypes] for file, names in self.files.items()}
        is_all = sorted(name for names in found.values() for name in names) == sorted(dtypes) and all(found.values())
        return found if is_all and self.dtypes(dtypes) == dict(dtypes) else {}

    @property
    def casts(self) -> Casts:
        """The dtypes of `rounded` tensors before and after."""
        return {name: (self.other_dtypes.get(name, self.dtype), dtype) for name, dtype in self.rounded.items()}

    def write(self, folder: Path) -> None:
        """Writes it into `folder`. One rank calls it."""
        content = {
            "format": FORMAT,
            "dtype": _name(self.dtype),
            "other_dtypes": {name: _name(dtype) for name, dtype in self.other_dtypes.items()},
            "aliases": sorted(self.aliases),
            "left_out": list(self.left_out),
            "rounded": {name: _name(dtype) for name, dtype in self.rounded.items()},
            "files": {file: list(names) for file, names in self.files.items()},
        }
        (folder / FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads the record in `folder`; None where it has none. Raises CheckpointError for a damaged one."""
        path = folder / FILE
        if not path.is_file():
            return None
        content = parse_json(regular_files.read(path), str(path))
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            others, rounded = (
                {str(name): _dtype(dtype) for name, dtype in content.get(key, {}).items()} for key in ("other_dtypes", "rounded")
            )
            files = {str(file): tuple(map(str, names)) for file, names in content.get("files", {}).items()}
            if strange := [file for file in files if not _FILE.fullmatch(file)]:
                raise ValueError(f"the file name {strange[0]!r}")
            return cls(_dtype(content["dtype"]), others, frozenset(content["aliases"]), tuple(content["left_out"]), rounded, files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} must be what this version of megabridge writes (format {FORMAT}), but: {error!r}; delete it to export "
                "without it, with the parameters' dtypes."
            ) from error


def _files(infos: Collection[TensorInfo]) -> dict[str, tuple[str, ...]]:
    if any(info.encoding is not None or not _FILE.fullmatch(info.file.name) for info in infos):
        return {}
    found: dict[str, list[str]] = {}
    for info in sorted(infos, key=lambda info: (info.file.name, info.start)):
        found.setdefault(info.file.name, []).append(info.name)
    return {file: tuple(names) for file, names in found.items()}


def _dtype(name: Any) -> torch.dtype:
    found = vars(torch).get(str(name))
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name!r}")
    return found
