"""Native checkpoints: a megatron-core distributed checkpoint (torch_dist) that any layout can continue from.

It holds the parameters, the optimizer state by parameter (`fully_reshardable`, so that tp2 can be read as pp2), the position
in the learning-rate schedule, progress, each rank's random state, in `assets/` the files of an HF export besides weights,
and digests of all that (digests.py). All functions here are called by every rank. A synchronous save starts no process, and
a load runs no code from the file: megatron-core's own `dist_checkpointing.load` unpickles anything, so its steps are
taken one by one here.
"""

from __future__ import annotations

import random
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import megabridge.platform as platform
from megabridge.errors import CheckpointError, listed
from megabridge.hf.dtypes import Casts, holds, joined
from megabridge.native import digests, fp8_scales, optimizer_state, reader, writer
from megabridge.native.digests import Digests
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import all_gather, on_rank_zero, raise_together, rank
from megabridge.parallel.topology import Topology
from megabridge.storage import folders, regular_files

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

ASSETS: Final = "assets"
FORMAT: Final = 1
_RNG: Final = "rng_state"
_FP8: Final = "fp8_scales"
_COMMON: Final = "megabridge"
_ADAPTER: Final = ".adapter."  # in the names of adapters' parameters


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a run, as a checkpoint records it."""

    step: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Sequences seen so far; the data continues after them."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """All settings and digests of the inputs, to be compared on resume."""
    recent_losses: Sequence[float] = ()
    """Losses of the last steps, if the run needs them to detect spikes (config group `policy`)."""
    same_layout: bool = True
    """After a load: whether the checkpoint was written under this layout, so that the random state was restored too."""
    rounded: Casts = field(default_factory=dict)
    """After a load: the tensors that were rounded because this run's parameters can't hold their dtype, by checkpoint name."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Facts of a native folder: its parameters' dtype (that of most elements), and whether they were trained."""

    dtype: torch.dtype
    is_trained: bool


def locate(path: Path) -> Path:
    """Finds the native folder of `path`: itself, that of a step, or a run's newest. Raises CheckpointError. Needs no ranks."""
    path = regular_files.expand(path)
    known = (path, path / folders.NATIVE, folders.latest(path), folders.latest(path / "checkpoints"))
    found = next((folder for folder in known if folder is not None and folders.is_committed(folder)), None)
    if found is None:
        raise CheckpointError(
            f"{path} must be a complete native checkpoint, a step's folder or a run's folder; no {folders.MARKER} with a .metadata "
            "beside it is there."
        )
    return found


def read_info(folder: Path) -> CheckpointInfo:
    """Reads the facts of a native folder, without tensors. A folder of another program counts as trained. Needs no ranks."""
    source = reader.open_folder(folder)
    common = source.read_common().get(_COMMON) if source.has_state else None
    dtypes: Counter[torch.dtype] = Counter()
    for name, (dtype, elements) in source.tensors().items():
        if not name.startswith("optimizer."):
            dtypes[dtype] += elements
    if not dtypes:
        raise CheckpointError(f"{folder} holds no parameters; use another checkpoint.")
    is_trained = not isinstance(common, dict) or "optimizer" in common or common.get("step") != 0
    return CheckpointInfo(dtypes.most_common(1)[0][0], is_trained)


def assets(folder: Path) -> Path | None:
    """Returns the assets folder of a native folder, None where it has none. Needs no ranks.

    Raises CheckpointError where a file in it is not as it was saved.
    """
    record = Digests.read(folder)
    if problems := [] if record is None else record.problems(folder, ASSETS):
        raise CheckpointError(f"{folder} must hold what was saved in it, but is damaged; use another step:\n  {listed(problems)}")
    return folder / ASSETS if (folder / ASSETS).is_dir() else None


def save(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    *,
    progress: TrainingProgress,
    optimizer: Any = None,
    scheduler: Any = None,
    write_assets: Callable[[Path], None] | None = None,
) -> None:
    """Writes a native checkpoint to `folder`, which must not exist; it gets that name only when it is complete.

    `optimizer` is megatron-core's (None: weights only), `scheduler` its OptimizerParamScheduler. `write_assets` is called
    on rank 0 with an empty folder. Raises CheckpointError on every rank; the model and the optimizer are never changed.
    """
    partial, number = on_rank_zero("starting a checkpoint", lambda: (folders.begin(folder), uuid.uuid4().hex))
    needed = 0
    try:
        state = _model_state(chunks)
        common: dict[str, Any] = {
            "format": FORMAT,
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "settings": dict(progress.settings),
            "recent_losses": list(progress.recent_losses),
            "layout": process_groups.running().sizes(),
        }
        if optimizer is not None:
            common["optimizer"] = optimizer_state.common(optimizer)
            state["optimizer"] = optimizer_state.sharded(optimizer, state, loading=False)
        if scheduler is not None:
            common["scheduler_steps"] = scheduler.num_steps
        state[_RNG] = _own(_RNG, _rng_state())
        scales = fp8_scales.scales(chunks)
        if any(all_gather(bool(scales))):
            common["fp8"], state[_FP8] = True, _own(_FP8, scales)
        state[_COMMON] = common
        state[reader.SAVE] = ShardedObject(reader.SAVE + number, True, (1,), (0,), replica_id=rank())
        needed = sum(all_gather(_bytes(state)))
        on_rank_zero("looking for space for a checkpoint", lambda: folders.check_space(partial, needed))
        boxes = writer.write(state, partial)
        on_rank_zero("committing a checkpoint", lambda: _publish(folder, write_assets, number, boxes))
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder} can't be written: {error}. Nothing was changed, and earlier steps are kept; {folders.space(folder, needed)}."
        ) from error


def _publish(folder: Path, write_assets: Callable[[Path], None] | None, number: str, boxes: digests.Boxes) -> None:
    partial = folders.partial_of(folder)
    if write_assets is not None:
        (partial / ASSETS).mkdir()
        write_assets(partial / ASSETS)
    Digests(number, boxes, digests.of_folder(partial)).write(partial)
    folders.commit(folder)


def size(chunks: Sequence[torch.nn.Module], optimizer: Any = None) -> int:
    """Bytes of the tensors that a `save` would write, told without making the optimizer's state. Every rank calls it."""
    state = _model_state(chunks)
    trained = sum(data.numel() for data in _written(state) if isinstance(data, torch.nn.Parameter) and data.requires_grad)
    each = 0 if optimizer is None else optimizer_state.bytes_each(optimizer)
    return sum(all_gather(_bytes(state) + trained * each))


def _bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors that this rank writes."""
    return sum(data.nbytes for data in _written(state))


def _written(state: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that this rank writes."""
    for entry in nested_values(dict(state)):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and is_main_replica(entry.replica_id) and entry.data is not None:
            yield entry.data


def load(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    agree: Callable[[TrainingProgress], object] | None = None,
) -> TrainingProgress:
    """Reads `folder`, written under any layout, into the model, the optimizer and the scheduler, bit for bit.

    Hyperparameters (learning rate, decay, betas) stay those of the running optimizer; only its state is read. The random
    state and FP8's scales are restored if the layout is the same. A folder that was converted and never trained has only
    weights: the run begins with them at step 0. `agree` is called with the progress before any tensor is compared or read, and
    raises the same error on every rank if the run can't continue from it. Raises CheckpointError on every rank: before anything is
    changed if the folder is incomplete or of another model; if a box in it is damaged, the boxes read before have been copied
    already.
    """
    with raise_together("opening a checkpoint"):
        source = reader.open_folder(folder)
        common = _common(source)
        _check_step(folder, common["step"])
        same_layout = Topology.of_sizes(common["layout"]) == process_groups.running()
    if agree is not None:
        agree(_progress(common))
    if optimizer is not None and "optimizer" not in common and common["step"] == 0:
        return replace(_progress(common), same_layout=True, rounded=load_weights(folder, chunks, optimizer=optimizer))
    state = _model_state(chunks)
    if optimizer is not None:
        if "optimizer" not in common:
            raise CheckpointError(f"{folder} holds weights only; load it as weights, or resume from another step.")
        optimizer_state.seed(optimizer)
        state["optimizer"] = optimizer_state.sharded(optimizer, state, loading=True)
    if same_layout:
        state[_RNG] = _own(_RNG, None)
        if common.get("fp8"):
            state[_FP8] = _own(_FP8, None)
    rounded = _check_names(source, state, ignored=() if optimizer is not None else ("optimizer.",))
    with raise_together("reading a checkpoint"):
        loaded = source.read(state)
        _fill(chunks, loaded)
        if optimizer is not None:
            optimizer_state.restore(optimizer, loaded["optimizer"], common["optimizer"])
    if scheduler is not None:
        scheduler.num_steps = 0
        scheduler.step(common.get("scheduler_steps", common["step"]))
    if same_layout:
        _set_rng_state(loaded[_RNG])
        fp8_scales.restore(chunks, loaded.get(_FP8, {}))
    return replace(_progress(common), same_layout=same_layout, rounded=rounded)


def load_weights(folder: Path, chunks: Sequence[torch.nn.Module], *, optimizer: Any = None) -> Casts:
    """Reads only the parameters of `folder`, ours or another megatron-core program's; `optimizer` copies them to its masters.

    Returns the tensors that were rounded, as in `TrainingProgress.rounded`.
    """
    with raise_together("opening a checkpoint"):
        source = reader.open_folder(folder)
    state = _model_state(chunks)
    rounded = _check_names(source, state, ignored=("optimizer.",))
    with raise_together("reading a checkpoint"):
        _fill(chunks, source.read(state))
    if optimizer is not None:
        optimizer.reload_model_params()
    return rounded


def keep_dtypes(folder: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Reallocates the parameters of chunks that are only converted with the dtypes stored in `folder`; their values are lost.

    Every rank calls it, before `load_weights`.
    """
    with raise_together("opening a checkpoint"):
        stored = reader.open_folder(folder).tensors()
    for chunk in unwrap_model(list(chunks)):
        own = {**dict(chunk.named_buffers()), **dict(chunk.named_parameters())}
        for name, entry in _sharded(chunk).items():
            parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            keys = [part.key for part in nested_values(parts) if isinstance(part, ShardedTensor)]
            dtypes = {stored[key][0] for key in keys if key in stored}
            if dtypes and (dtype := joined(dtypes)) != own[name].dtype:
                own[name].data = torch.empty(own[name].shape, dtype=dtype, device=own[name].device)


def _progress(common: Mapping[str, Any]) -> TrainingProgress:
    """Progress from a checkpoint's common state."""
    return TrainingProgress(
        step=common["step"],
        consumed_samples=common["consumed_samples"],
        settings=common["settings"],
        recent_losses=common.get("recent_losses", ()),
    )


def _common(source: reader.NativeReader) -> dict[str, Any]:
    common = source.read_common().get(_COMMON)
    if not isinstance(common, dict) or common.get("format") != FORMAT:
        raise CheckpointError(
            f"{source.folder} was not written by this version of megabridge (format {FORMAT}), so a run can't continue "
            "from it; load its weights instead."
        )
    return common


def _check_step(folder: Path, step: int) -> None:
    """Raises CheckpointError if `folder` has the name of another step: the names decide which step is newest or removed."""
    named = folders.STEP.fullmatch(folder.parent.name) if folder.name == folders.NATIVE else None
    if named is not None and int(named[1]) != step:
        raise CheckpointError(
            f"{folder} must hold the step that its folder is named after, but holds step {step}; rename {folder.parent.name} to "
            f"step_{step}, or use another step."
        )


def _model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded parameters, under the keys that Megatron-LM uses: `model`, or `model0`, `model1`, ... where there are chunks."""
    return {
        "model" if len(chunks) == 1 else f"model{index}": _sharded(chunk) for index, chunk in enumerate(unwrap_model(list(chunks)))
    }


def _sharded(chunk: Any) -> dict[str, Any]:
    """A chunk's sharded parameters by local name, without Transformer Engine's extra state: a pickle, saved by fp8_scales.py."""
    return {name: tensor for name, tensor in chunk.sharded_state_dict().items() if not name.endswith("_extra_state")}


def _fill(chunks: Sequence[torch.nn.Module], loaded: Mapping[str, Any]) -> None:
    for index, chunk in enumerate(unwrap_model(list(chunks))):
        read = loaded.get("model" if len(chunks) == 1 else f"model{index}", {})  # nothing for a stage without adapters
        wrong = chunk.load_state_dict(read, strict=False)
        # A chunk with a sharded state of its own reads adapters alone; all else came with the model.
        missing = wrong.missing_keys if chunk.own_sharded_state is None else ()
        names = [name for name in (*missing, *wrong.unexpected_keys) if not name.endswith("_extra_state")]
        if names:
            raise CheckpointError(f"parameters that the checkpoint and the model don't share:\n  {listed(names)}")


def _check_names(source: reader.NativeReader, state: Mapping[str, Any], *, ignored: tuple[str, ...]) -> Casts:
    """Returns the tensors to be rounded; raises on every rank if the folder lacks tensors of the model, or has other ones."""
    wanted = reader.requested_entries(state)
    stored = source.tensors()
    casts = {
        key: (stored[key][0], entry.dtype) for key, entry in wanted.items() if key in stored and isinstance(entry, ShardedTensor)
    }
    lossy = {key: pair for key, pair in casts.items() if not holds(pair[1], pair[0])}
    everyones = all_gather((set(wanted), source.problems(wanted), lossy))
    wrong = sorted({problem for _, theirs, _ in everyones for problem in theirs})
    extra = stored.keys() - set().union(*(names for names, _, _ in everyones))
    wrong += [f"{name}: in the checkpoint, not in the model" for name in sorted(extra) if not name.startswith(ignored)]
    if wrong:
        raise CheckpointError(
            f"{source.folder} doesn't fit this model; {_kind(stored, everyones)}use the configuration it was written with:\n  "
            f"{listed(wrong)}"
        )
    return {key: pair for _, _, found in everyones for key, pair in found.items()}


def _kind(stored: Collection[str], everyones: Sequence[tuple[set[str], object, object]]) -> str:
    """Where one of checkpoint and model has adapters and the other has none."""
    has, asks = (any(_ADAPTER in name for name in names) for names in (stored, set().union(*(names for names, _, _ in everyones))))
    if has == asks:
        return ""
    if has:
        return "it holds adapters, so set peft=lora (or dora) as in its run; "
    return "it holds a whole model, and this run trains adapters: set peft=none, or export it and give that as model.path; "


def _own(key: str, state: Any) -> Any:
    """Makes the sharded object of state that each rank has for itself."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(key, state, (world,), (rank,), replica_id=0)


def _rng_state() -> dict[str, Any]:
    """The state of every random generator that a step may use, as plain numbers and tensors."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if not platform.is_cpu():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and not platform.is_cpu():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
