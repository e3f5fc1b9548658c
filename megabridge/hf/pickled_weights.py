"""Locates the tensors in torch's pickled weights (`pytorch_model.bin`) without running code. Used only on request.

The pickle is read by torch's weights-only unpickler with fake tensors, which have the offset of each storage in the file; after
that a tensor is read like one in a safetensors file.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from megabridge.errors import CheckpointError, listed
from megabridge.hf.safetensors_format import DTYPES, Stamp, TensorInfo, stamp_of
from megabridge.storage import regular_files

_REMEDY = "save it again with transformers' save_pretrained, as safetensors"


def read_pickle(file: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a file written by torch.save. Raises CheckpointError for anything but a dict of plain tensors."""
    with regular_files.opened(file) as stream:
        stamp = stamp_of(stream.fileno())
        records = _records(file, stream)
    content = _unpickled(file)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} must hold a dict from names to tensors, not a {type(content).__name__}; {_REMEDY}.")
    infos: dict[str, TensorInfo] = {}
    problems = []
    for name, value in content.items():
        try:
            infos[name] = _info(file, name, value, records, stamp)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CheckpointError(f"{file} must hold plain tensors; {_REMEDY}:\n  " + listed(problems))
    return infos


def _unpickled(file: Path) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), str(error)[:300])
        raise CheckpointError(
            f"{file} asks for more than tensors ({refused.strip()}); it was not run. Don't use checkpoints from this source."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{file} can't be read ({str(error)[:300]}); fetch it again, or {_REMEDY}.") from error


def _records(file: Path, stream: IO[bytes]) -> dict[int, int]:
    """The sizes of the uncompressed records of the zip archive that torch.save writes, by offset in the file."""
    out: dict[int, int] = {}
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise CheckpointError(f"{file} was written on a big-endian machine; {_REMEDY}.")
                stream.seek(entry.header_offset + 26)  # lengths of name and extra field (APPNOTE.TXT 4.3.7)
                name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
                if entry.compress_type == zipfile.ZIP_STORED:
                    out[entry.header_offset + 30 + name + extra] = entry.file_size
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{file} is damaged, or of a torch before 1.6 ({error}); fetch it again, or {_REMEDY}.") from error
    return out


def _info(file: Path, name: str, value: Any, records: dict[int, int], stamp: Stamp) -> TensorInfo:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise ValueError(f"a {type(value).__name__}")
    if value.dtype not in DTYPES.values():
        raise ValueError(f"of dtype {value.dtype}")
    if not value.is_contiguous():
        raise ValueError("a view that is not contiguous")
    storage = value.untyped_storage()
    start: int | None = storage._checkpoint_offset
    shape, first = tuple(value.shape), int(value.storage_offset()) * value.dtype.itemsize
    if start is None or records.get(start) != storage.nbytes() or first + value.numel() * value.dtype.itemsize > storage.nbytes():
        raise ValueError("its bytes are not where they should be")
    return TensorInfo(name, file, value.dtype, shape, start + first, stamp)
