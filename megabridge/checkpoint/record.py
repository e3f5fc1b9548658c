"""What a native checkpoint keeps of the Hugging Face weights it began with, so that an export in another process has it too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import torch

from megabridge import regular
from megabridge.checkpoint.safetensors import TensorInfo, parse_json
from megabridge.errors import CheckpointError

FILE: Final = "megabridge_source.json"
FORMAT: Final = 1


@dataclass(frozen=True)
class SourceRecord:
    """Facts of the imported files that the parameters don't tell.

    `dtype` is that of most tensors, `other_dtypes` names the rest; `aliases` are copies of tied tensors that the files carried;
    `left_out` are tensors that no parameter took, and parameters that no tensor fed, because the import was not strict.
    """

    dtype: torch.dtype
    other_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    aliases: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo], *, aliases: Iterable[str], left_out: Iterable[str] = ()) -> Self:
        """The record of a folder's tensors (at least one)."""
        most = Counter(info.dtype for info in infos.values()).most_common(1)[0][0]
        others = {name: info.dtype for name, info in infos.items() if info.dtype != most}
        return cls(most, others, frozenset(aliases), tuple(left_out))

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The source's dtype of each of `names`."""
        return {name: self.other_dtypes.get(name, self.dtype) for name in names}

    def write(self, folder: Path) -> None:
        """Writes it into `folder`. One rank calls it."""
        content = {
            "format": FORMAT,
            "dtype": _name(self.dtype),
            "other_dtypes": {name: _name(dtype) for name, dtype in self.other_dtypes.items()},
            "aliases": sorted(self.aliases),
            "left_out": list(self.left_out),
        }
        (folder / FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in `folder`; None where it has none. Raises CheckpointError for one that is damaged."""
        path = folder / FILE
        if not path.is_file():
            return None
        content = parse_json(regular.read(path), str(path))
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            others = {str(name): _dtype(dtype) for name, dtype in content["other_dtypes"].items()}
            return cls(_dtype(content["dtype"]), others, frozenset(content["aliases"]), tuple(content["left_out"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} must be what this version of megabridge writes (format {FORMAT}), but: {error!r}; delete it to export "
                "without it, with the parameters' dtypes."
            ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    found = vars(torch).get(str(name))
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name!r}")
    return found
