"""Reads tensors and objects from a torch_dist folder without executing anything in it.

It takes the steps of megatron/core/dist_checkpointing/serialization.py:load and strategies/torch.py:TorchDistLoadShardedStrategy,
with four differences: `.metadata` is read by safe_unpickling.py, objects by torch's weights-only unpickler, files are checked
(name, presence, size) before a weight is changed, and a box is compared with its digest before it is copied anywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final, override

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.futures import Future

from megabridge.errors import CheckpointError, MegabridgeError, listed
from megabridge.native import digests
from megabridge.native.digests import Digests
from megabridge.native.safe_unpickling import parse_metadata
from megabridge.platform.patches import factory_merges
from megabridge.storage import folders, regular_files

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.utils import extract_sharded_base

_COMMON_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key
SAVE: Final = "megabridge_save."
"""Prefix of the name of an object in every save with digests; the rest of the name is the save's id."""


@dataclass(frozen=True)
class NativeReader:
    """An opened native folder, whose metadata has been read and whose files have been checked.

    Without `digests`, in a folder of another program, content is not verified.
    """

    folder: Path
    metadata: Any
    digests: Digests | None

    def tensors(self) -> dict[str, tuple[torch.dtype, int]]:
        """Returns dtype and number of elements of all tensors in the folder, by global name."""
        entries = self.metadata.state_dict_metadata.items()
        return {key: (e.properties.dtype, e.size.numel()) for key, e in entries if isinstance(e, TensorStorageMetadata)}

    @property
    def has_state(self) -> bool:
        """Whether there is common state to read: megatron-core before 0.19 wrote it elsewhere."""
        return _COMMON_KEY in self.metadata.state_dict_metadata

    def problems(self, wanted: Mapping[str, Any]) -> list[str]:
        """Returns a line for each entry of `wanted` (from `requested_entries`) that the folder lacks or has in another shape."""
        found = []
        for key, entry in wanted.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if stored is None:
                found.append(f"{key}: in the model, not in the checkpoint")
            elif isinstance(entry, ShardedTensor) and not entry.allow_shape_mismatch:
                shape, size = tuple(entry.global_shape), tuple(stored.size)
                if shape != size:
                    found.append(f"{key}: shape {list(shape)} in the model, {list(size)} in the checkpoint")
        return found

    def read_common(self) -> dict[str, Any]:
        """Reads the state that is equal on all ranks."""
        if not self.has_state:
            raise CheckpointError(
                f"{self.folder} has no common state (megatron-core before 0.19 wrote it elsewhere); load its weights instead."
            )
        target: dict[str, Any] = {_COMMON_KEY: io.BytesIO()}
        self._read_into(target, _Planner(flatten_state_dict=False, flatten_sharded_tensors=False))
        values = target[_COMMON_KEY][0]
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.folder} holds a common state of type {type(values).__name__}; it is damaged.")
        return values

    def read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the entries of `state` (a sharded state dict), tensors in place where they exist, and objects; returns the state.

        Entries of `state` that are not sharded are kept. Calls no collective.
        """
        prepared, nonpersistent, factories = load_preprocess(dict(state))
        entries, result = extract_sharded_base(prepared)
        merge(result, nonpersistent)
        tensors = [entry for entry in nested_values(entries) if isinstance(entry, ShardedTensor)]
        by_key, flat_mapping, rename_mapping = torch_dist._replace_state_dict_keys_with_sharded_keys(entries)
        target = torch_dist.mcore_to_pyt_state_dict(by_key, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[entry for entry in tensors if not entry.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={entry.key: entry for entry in tensors if entry.allow_shape_mismatch},
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        self._read_into(target, planner)
        values = {key: torch_dist._unwrap_pyt_sharded_tensor(value) for key, value in target.items()}
        loaded = torch_dist._replace_sharded_keys_with_state_dict_keys(values, flat_mapping, rename_mapping)
        torch_dist._restore_dict_types(loaded, entries)
        merge(result, loaded)
        wholes, _ = extract_matching_values(dict(state), lambda entry: isinstance(entry, ShardedTensorFactory), True)
        factory_merges.merge_in_place(factories, wholes)
        merged: dict[str, Any] = apply_factory_merges(result, factories)
        return merged

    def _read_into(self, target: dict[str, Any], planner: Any) -> None:
        reader = _Reader(self)
        try:
            dcp_load(target, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:  # a BaseException, which handlers of Exception don't catch
            (cause, _), *_ = error.failures.values()
            if isinstance(cause, MegabridgeError) or not isinstance(cause, Exception):
                raise cause from error
            raise CheckpointError(f"{self.folder} can't be read ({type(cause).__name__}: {cause}); use another step.") from error
        if reader.wrong:
            raise CheckpointError(
                f"{self.folder} must hold what was saved in it, but is damaged or has files of another checkpoint; use another "
                f"step. These have other bytes than were saved:\n  {listed(reader.wrong)}"
            )


class _Reader(FileSystemReader):
    """torch's reader with metadata that has been read already; compares boxes with their digests, if there are any.

    A box that differs is not copied, and `wrong` gets a line for it.
    """

    def __init__(self, source: NativeReader) -> None:
        super().__init__(source.folder)
        self._folder = source.folder
        self._metadata = source.metadata
        self._digests = source.digests
        self.wrong: list[str] = []

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata: Metadata = self._metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    @override
    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        def place(item: ReadItem) -> tuple[str, int]:
            entry = self.storage_data[item.storage_index]
            return entry.relative_path, entry.offset

        for (file, offset), items in groupby(sorted(plan.items, key=place), key=place):
            self._read_box(file, offset, list(items), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _tensor(self, stream: Any) -> Any:
        """Reads a box's tensor; None where it is none and digests will say so."""
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception:  # whatever bytes of something else make of a zip archive and a pickle
            if self._digests is None:
                raise
            return None

    def _read_box(self, file: str, offset: int, items: list[ReadItem], planner: Any) -> None:
        """Reads a box once, for all its items."""
        entry = self.storage_data[items[0].storage_index]
        is_object = items[0].type == LoadItemType.BYTE_IO
        with regular_files.opened(self._folder / file) as stream:
            part = self._slice_file(stream, entry)
            # Other programs may have compressed it.
            unpacked = self.transforms.transform_load_stream(items[0], entry.transform_descriptors or (), part)
            whole: Any = unpacked if not is_object and unpacked.seekable() else io.BytesIO(unpacked.read(-1))
            value = whole if is_object else self._tensor(whole)
        if self._digests is not None and (value is None or digests.of_box(value) != self._digests.boxes[file][offset]):
            self.wrong.append(f"{file}: {_named(items[0])}")
            return
        for item in items:
            if is_object:
                planner.load_bytes(item, value)
                continue
            box = narrow_tensor_by_index(value, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            if target.size() != box.size():
                raise CheckpointError(f"{file}: {_named(item)} is {list(box.size())}, not {list(target.size())}; use another step.")
            target.copy_(box)
            planner.commit_tensor(item, target)


class _Planner(torch_dist.MCoreLoadPlanner):  # type: ignore[misc]
    """megatron-core's planner, which reads objects by torch's weights-only unpickler."""

    @override
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


def _named(item: ReadItem) -> str:
    """Name of a box in messages."""
    index = item.storage_index
    return index.fqn if index.offset is None else f"{index.fqn} from {list(index.offset)}"


def requested_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sharded entries of `state` by their names in a checkpoint."""
    prepared, _, _ = load_preprocess(dict(state))
    entries, _ = extract_sharded_base(prepared)
    return {entry.unique_key if isinstance(entry, ShardedObject) else entry.key: entry for entry in nested_values(entries)}


def open_folder(folder: Path) -> NativeReader:
    """Opens `folder`: reads its metadata, and checks its digests and every file that it names. Raises CheckpointError."""
    if not folders.is_committed(folder):
        raise CheckpointError(
            f"{folder} is not a complete native checkpoint (no {folders.MARKER} or no .metadata in it); "
            "give the folder of a saved step, .../checkpoints/step_N/native."
        )
    record = Digests.read(folder)
    content = regular_files.read(folder / digests.METADATA)
    if record is not None:
        record.check_metadata(folder, content)
        record.check_marker(folder)
    metadata = parse_metadata(folder / digests.METADATA, content)
    try:
        entries = list((metadata.storage_data or {}).values())
        problems = list(_misplaced(folder, entries))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / digests.METADATA} must say of every box its file, offset and length ({error}); use another step."
        ) from None
    if problems:
        raise CheckpointError(f"{folder} is damaged; use another step:\n  {listed(problems)}")
    source = NativeReader(folder, metadata, record)
    _check_record(source, entries)
    return source


def _misplaced(folder: Path, entries: list[Any]) -> Iterator[str]:
    """Yields a line for each file in the metadata that is missing or too short."""
    needed: dict[str, int] = {}
    for entry in entries:
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, size in sorted(needed.items()):
        if Path(name).name != name or name in (".", ".."):
            yield f"{name!r} points out of the folder"
        elif not (folder / name).is_file():
            yield f"{name} is missing"
        elif (folder / name).stat().st_size < size:
            yield f"{name} has {(folder / name).stat().st_size} bytes of at least {size}"


def _check_record(source: NativeReader, entries: list[Any]) -> None:
    """Raises CheckpointError if a checkpoint that was saved with digests lacks some, or has those of another save."""
    record, path = source.digests, source.folder / digests.FILE
    names = (str(name) for name in source.metadata.state_dict_metadata)
    save = next((name.removeprefix(SAVE).partition("/")[0] for name in names if name.startswith(SAVE)), None)
    if save != (None if record is None else record.save):
        found = "is missing" if record is None else f"is of save {record.save}, not {save}"
        raise CheckpointError(
            f"{source.folder} was saved with digests of what is in it, but {path.name} {found}; use another step."
        )
    lacking = [] if record is None else [e for e in entries if e.offset not in record.boxes.get(e.relative_path, {})]
    if lacking:
        raise CheckpointError(
            f"{path} must have a digest of each of the {len(entries)} boxes, but lacks {len(lacking)}; use another step."
        )
