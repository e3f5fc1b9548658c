"""The tensors of Hugging Face folders, as bytes."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

from megabridge.conversion.manifest import MANIFEST
from megabridge.hf.tensor_files import find_tensors


def payload(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor of a folder."""
    infos = find_tensors(folder)
    files = {file: file.read_bytes() for file in {info.file for info in infos.values()}}
    return {
        name: (str(info.dtype), info.shape, files[info.file][info.start : info.start + info.nbytes]) for name, info in infos.items()
    }


def identical(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files with the same content, as `diff -r` sees it; manifests but for the layout in them."""
    found = filecmp.dircmp(left, right)
    if found.left_only or found.right_only or found.funny_files:
        return False
    _, mismatch, errors = filecmp.cmpfiles(left, right, set(found.common_files) - {MANIFEST}, shallow=False)
    if MANIFEST in found.common_files and tensors_and_files(left) != tensors_and_files(right):
        return False
    return not mismatch and not errors and all(identical(left / name, right / name) for name in found.common_dirs)


def tensors_and_files(folder: Path) -> dict[str, Any]:
    """What a manifest says but for the layout."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    assert content.pop("layout")
    return content
