"""Changes to exported folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megabridge.hf.tensor_files import find_tensors

NORM = "model.norm.weight"


def flip(folder: Path, name: str, byte: int) -> None:
    """One bit of one byte of a tensor."""
    info = find_tensors(folder)[name]
    with info.file.open("r+b") as stream:
        stream.seek(info.start + byte)
        (value,) = stream.read(1)
        stream.seek(info.start + byte)
        stream.write(bytes([value ^ 4]))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "megabridge.json").read_text())
    change(content)
    (folder / "megabridge.json").write_text(json.dumps(content))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


HARMLESS = ("README.md", "LICENSE", ".gitattributes", ".gitignore", ".git/config", ".git/hooks/x.py", ".cache/huggingface/x.lock")


def put(folder: Path, names: Iterable[str], make: Callable[[Path], object] = lambda path: path.write_bytes(b"x")) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder / name)
