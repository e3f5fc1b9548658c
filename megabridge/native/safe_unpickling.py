"""Restricted unpickler for the `.metadata` of a distributed checkpoint, which runs no code from the file.

`.metadata` of torch's distributed checkpoint (DCP) is a pickle, and torch's own reader executes it. The unpickler here
builds the classes that DCP and megatron-core write there and nothing else. Imports neither torch nor megatron: the
allowed names are resolved only when a file mentions them.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Final, override

from megabridge.errors import CheckpointError

_DTYPES: Final = frozenset(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex32 complex64 "
    "complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
)

# torch/distributed/checkpoint/{metadata,filesystem,planner}.py and, for checkpoints of older megatron-core,
# megatron/core/dist_checkpointing/strategies/torch.py.
ALLOWED: Final[dict[str, frozenset[str]]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
        "TensorProperties _MEM_FORMAT_ENCODING".split()
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.planner": frozenset(
        {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}
    ),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    "torch": frozenset({"Size"}) | _DTYPES,
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath"}),
    "pathlib._local": frozenset({"Path", "PosixPath", "PurePosixPath"}),
}


class _Refused(pickle.UnpicklingError):
    """A global outside of ALLOWED, with its name as the message."""


class MetadataUnpickler(pickle.Unpickler):
    """An unpickler that builds the classes in ALLOWED and refuses all others."""

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in ALLOWED.get(module_name, frozenset()):
            raise _Refused(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def parse_metadata(path: Path, content: bytes) -> Any:
    """Parses `content`, that of the DCP `.metadata` file `path`, into its `Metadata`.

    Raises CheckpointError that names the file and, if one was refused, the class.
    """
    try:
        metadata = MetadataUnpickler(io.BytesIO(content)).load()
    except _Refused as error:
        raise CheckpointError(
            f"{path} asks for {error}, which is not part of a checkpoint's metadata; it was not run. "
            "Don't use checkpoints from this source."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} can't be read ({error}); the checkpoint is damaged, use another step.") from error
    if type(metadata).__name__ != "Metadata":
        raise CheckpointError(f"{path} must hold a Metadata, not a {type(metadata).__name__}; use another step.")
    return metadata
