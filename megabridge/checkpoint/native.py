"""Native checkpoints: a megatron-core distributed checkpoint (torch_dist) that any layout can continue from.

What is in one: parameters, optimizer state by parameter (`fully_reshardable`, so that tp2 can be read as pp2), the
learning-rate schedule's place, progress, each rank's random state, and in `assets/` what an HF export needs beyond
weights. All functions here are called by every rank. A synchronous save starts no process, and a load runs no code that
came with the file: megatron-core's own `dist_checkpointing.load` unpickles freely, so its steps are taken one by one here.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, override

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

import megabridge.platform as platform
from megabridge import regular
from megabridge.agreement import gather, on_rank_zero, together
from megabridge.checkpoint import folders, fp8, optimizer_state, reader
from megabridge.errors import CheckpointError, listed
from megabridge.platform import quiet

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

ASSETS: Final = "assets"
FORMAT: Final = 1
_RNG: Final = "rng_state"
_FP8: Final = "fp8_scales"
_COMMON: Final = "megabridge"

# A synchronous save goes through the same function, so the advice to use another package for asynchronous ones comes up.
quiet.drop("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated")


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Sequences seen; the data order continues from here."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What the run's course depends on (seed, batch size, learning rate, ...), to be compared on resume."""
    recent_losses: Sequence[float] = ()
    """The last steps' losses, where the run compares them with the next (config group `policy`)."""
    same_layout: bool = True
    """On a load: whether the checkpoint was written under this layout, so that the random state was restored too."""


@dataclass(frozen=True)
class Stored:
    """What a native folder says of itself: its parameters' dtype (most elements' one), and whether they were trained."""

    dtype: torch.dtype
    is_trained: bool


def locate(path: Path) -> Path:
    """The native folder that `path` names: itself, the one of a step, or a run's newest. Needs no ranks."""
    path = regular.place(path)
    known = (path, path / folders.NATIVE, folders.latest(path), folders.latest(path / "checkpoints"))
    found = next((folder for folder in known if folder is not None and folders.is_committed(folder)), None)
    if found is None:
        raise CheckpointError(
            f"{path} must be a complete native checkpoint, a step's folder or a run's folder; no {folders.MARKER} with a .metadata "
            "beside it is there."
        )
    return found


def stored(folder: Path) -> Stored:
    """What is in a native folder, without reading a tensor. A folder of another program's counts as trained. Needs no ranks."""
    source = reader.open_folder(folder)
    common = source.read_common().get(_COMMON) if source.has_state else None
    dtypes: Counter[torch.dtype] = Counter()
    for name, (dtype, elements) in source.tensors().items():
        if not name.startswith("optimizer."):
            dtypes[dtype] += elements
    if not dtypes:
        raise CheckpointError(f"{folder} holds no parameters; use another checkpoint.")
    is_trained = not isinstance(common, dict) or "optimizer" in common or common.get("step") != 0
    return Stored(dtypes.most_common(1)[0][0], is_trained)


def layout() -> dict[str, int]:
    """The sizes of the running process groups."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def save(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    *,
    progress: Progress,
    optimizer: Any = None,
    scheduler: Any = None,
    write_assets: Callable[[Path], None] | None = None,
) -> None:
    """Writes a native checkpoint to `folder`, which must not exist; it appears under that name only when it is complete.

    `optimizer` is megatron-core's (None: weights only), `scheduler` its OptimizerParamScheduler. `write_assets` is called
    on rank 0 with an empty folder. Raises CheckpointError on every rank; the model and the optimizer are never changed.
    """
    partial = on_rank_zero("starting a checkpoint", lambda: folders.begin(folder))
    needed = 0
    try:
        state = _model_state(chunks)
        common: dict[str, Any] = {
            "format": FORMAT,
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "settings": dict(progress.settings),
            "recent_losses": list(progress.recent_losses),
            "layout": layout(),
        }
        if optimizer is not None:
            common["optimizer"] = optimizer_state.common(optimizer)
            state["optimizer"] = optimizer_state.sharded(optimizer, state, loading=False)
        if scheduler is not None:
            common["scheduler_steps"] = scheduler.num_steps
        state[_RNG] = _own(_RNG, _rng_state())
        scales = fp8.scales(chunks)
        if any(gather(bool(scales))):
            common["fp8"], state[_FP8] = True, _own(_FP8, scales)
        state[_COMMON] = common
        needed = sum(gather(_bytes(state)))
        on_rank_zero("looking for space for a checkpoint", lambda: folders.check_space(partial, needed))
        _write(_without_views(state), partial)
        on_rank_zero("committing a checkpoint", lambda: _publish(folder, write_assets))
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder} can't be written: {error}. Nothing was changed, and earlier steps are kept; {folders.space(folder, needed)}."
        ) from error


def _publish(folder: Path, write_assets: Callable[[Path], None] | None) -> None:
    if write_assets is not None:
        place = folders.partial_of(folder) / ASSETS
        place.mkdir()
        write_assets(place)
    folders.commit(folder)


def _bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors that this rank writes."""
    tensors = (entry for entry in nested_values(dict(state)) if isinstance(entry, ShardedTensor | ShardedTensorFactory))
    return sum(entry.data.nbytes for entry in tensors if is_main_replica(entry.replica_id) and entry.data is not None)


def load(folder: Path, chunks: Sequence[torch.nn.Module], *, optimizer: Any = None, scheduler: Any = None) -> Progress:
    """Reads `folder`, written under any layout, into the model, the optimizer and the scheduler, bit for bit.

    Hyperparameters (learning rate, decay, betas) stay those of the running optimizer; only its state is read. The random
    state and FP8's scales are restored where the layout is the same. A folder that was converted and never trained gives
    its weights only: the run begins with them at step 0. Raises CheckpointError on every rank, and before anything is
    changed where the folder is incomplete, damaged or of another model.
    """
    with together("opening a checkpoint"):
        source = reader.open_folder(folder)
        common = _common(source)
    if optimizer is not None and "optimizer" not in common and common["step"] == 0:
        load_weights(folder, chunks, optimizer=optimizer)
        return replace(_progress(common), same_layout=True)
    state = _model_state(chunks)
    if optimizer is not None:
        if "optimizer" not in common:
            raise CheckpointError(f"{folder} holds weights only; load it as weights, or resume from another step.")
        optimizer_state.seed(optimizer)
        state["optimizer"] = optimizer_state.sharded(optimizer, state, loading=True)
    same_layout = common["layout"] == layout()
    if same_layout:
        state[_RNG] = _own(_RNG, None)
        if common.get("fp8"):
            state[_FP8] = _own(_FP8, None)
    _check_names(source, state, ignored=() if optimizer is not None else ("optimizer.",))
    with together("reading a checkpoint"):
        loaded = source.read(state)
        _fill(chunks, loaded)
        if optimizer is not None:
            optimizer_state.restore(optimizer, loaded["optimizer"], common["optimizer"])
    if scheduler is not None:
        scheduler.num_steps = 0
        scheduler.step(common.get("scheduler_steps", common["step"]))
    if same_layout:
        _set_rng_state(loaded[_RNG])
        fp8.restore(chunks, loaded.get(_FP8, {}))
    return replace(_progress(common), same_layout=same_layout)


def load_weights(folder: Path, chunks: Sequence[torch.nn.Module], *, optimizer: Any = None) -> None:
    """Reads only the parameters of `folder`, ours or another megatron-core program's; `optimizer` takes them as its masters."""
    with together("opening a checkpoint"):
        source = reader.open_folder(folder)
    state = _model_state(chunks)
    _check_names(source, state, ignored=("optimizer.",))
    with together("reading a checkpoint"):
        _fill(chunks, source.read(state))
    if optimizer is not None:
        optimizer.reload_model_params()


def _progress(common: Mapping[str, Any]) -> Progress:
    """Progress out of a checkpoint's common state."""
    return Progress(
        step=common["step"],
        consumed_samples=common["consumed_samples"],
        settings=common["settings"],
        recent_losses=common.get("recent_losses", ()),
    )


def _write(state: dict[str, Any], partial: Path) -> None:
    """Writes `state` with megatron-core's writer, in this process. Raises the cause where any rank's file can't be written."""
    if filesystem_async._results_queue is None:
        # It would start a process that serves a queue between processes.
        filesystem_async._results_queue = queue.Queue()
    if not filesystem_async.HAVE_PSUTIL:
        # It measures memory for a debug line, and raises where psutil is missing.
        filesystem_async._process_memory = lambda: 0
    causes = _Causes()
    filesystem_async.logger.addFilter(causes)
    try:
        dist_checkpointing.save(state, str(partial))
    except CheckpointException as error:  # on every rank; it is no Exception, and names the cause's type only
        found = [cause for rank_causes in gather(causes.found) for cause in rank_causes]
        raise CheckpointError(found[0] if found else str(error)) from error
    finally:
        filesystem_async.logger.removeFilter(causes)


class _Causes(logging.Filter):
    """Keeps what the writer logs as an error instead of raising it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        self.found.append(record.getMessage().removeprefix("Local worker 0 encountered an error: "))
        return False


def _common(source: reader.Source) -> dict[str, Any]:
    common = source.read_common().get(_COMMON)
    if not isinstance(common, dict) or common.get("format") != FORMAT:
        raise CheckpointError(
            f"{source.folder} was not written by this version of megabridge (format {FORMAT}), so a run can't continue "
            "from it; load its weights instead."
        )
    return common


def _model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded parameters, under the keys that Megatron-LM uses: `model`, or `model0`, `model1`, ... where there are chunks."""
    state = {}
    for index, chunk in enumerate(unwrap_model(list(chunks))):
        tensors = chunk.sharded_state_dict()
        # Transformer Engine's extra state is a pickle of its own, of what fp8.py stores.
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("_extra_state")}
        state["model" if len(chunks) == 1 else f"model{index}"] = kept
    return state


def _without_views(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with every CPU tensor over the same memory as a storage of its own: megatron-core's writer copies views first."""
    apply_factories(state)

    def alone(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor) and isinstance(entry.data, torch.Tensor):
            entry.data = _alone(entry.data)
        return entry

    dict_list_map_inplace(alone, state)
    return state


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    is_view = tensor.untyped_storage().size() != tensor.nbytes
    if tensor.device.type != "cpu" or not is_view or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # which may be held by nothing else: the optimizer's entries are made for the save
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _fill(chunks: Sequence[torch.nn.Module], loaded: Mapping[str, Any]) -> None:
    for index, chunk in enumerate(unwrap_model(list(chunks))):
        read = loaded.get("model" if len(chunks) == 1 else f"model{index}", {})  # nothing for a stage without adapters
        wrong = chunk.load_state_dict(read, strict=False)
        missing = wrong.missing_keys if chunk.stored is None else ()  # adapters alone are read; the rest came with the model
        names = [name for name in (*missing, *wrong.unexpected_keys) if not name.endswith("_extra_state")]
        if names:
            raise CheckpointError(f"parameters that the checkpoint and the model don't share:\n  {listed(names)}")


def _check_names(source: reader.Source, state: Mapping[str, Any], *, ignored: tuple[str, ...]) -> None:
    """Raises on every rank where a rank asks for what the folder lacks, or no rank asks for what it holds."""
    wanted = reader.requested(state)
    problems = source.problems(wanted)
    everyones = gather((set(wanted), problems))
    wrong = sorted({problem for _, theirs in everyones for problem in theirs})
    extra = source.tensors().keys() - set().union(*(names for names, _ in everyones))
    wrong += [f"{name}: in the checkpoint, not in the model" for name in sorted(extra) if not name.startswith(ignored)]
    if wrong:
        raise CheckpointError(
            f"{source.folder} doesn't fit this model; use the configuration it was written with:\n  {listed(wrong)}"
        )


def _own(key: str, state: Any) -> Any:
    """What each rank has for itself."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(key, state, (world,), (rank,), replica_id=0)


def _rng_state() -> dict[str, Any]:
    """The state of every generator that a step may use, as plain numbers and tensors."""
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
