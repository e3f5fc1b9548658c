"""Measures one layout for `recipe=bench bench=conversion`, on every rank. Started by recipes/bench.py.

Times are taken between two barriers, so that the slowest rank counts; the best of `bench.repeats` is kept, and a measurement
alternates with its peers. Memory, collectives and CPU time are measured in separate passes that are not timed.
"""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import megabridge.platform as platform
from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config.schema import Config
from megabridge.conversion.file_writer import write_index
from megabridge.conversion.plan import Plan
from megabridge.conversion.shards import plan_shards
from megabridge.hf.tensor_files import find_tensors
from megabridge.parallel import collectives, process_groups
from megabridge.platform.patches.counted_collectives import counted
from megabridge.training import build
from recipes import bench_peers as peers

Model = list[torch.nn.Module]


@dataclass
class Subject:
    """The model that is converted, and the folder with its weights."""

    config: Config
    folder: Path
    bridge: AutoBridge

    def fresh(self) -> Model:
        """Builds the model in memory that hasn't been written to. Every rank calls it."""
        provider = build.provider(self.config, self.bridge)
        return provider.provide_distributed_model(wrap_with_ddp=False, init="empty")

    def load(self, model: Model, *, verify: bool = False) -> Any:
        return self.bridge.load_hf_weights(model, show_progress=False, verify=verify)

    def save(self, model: Model, folder: Path, *, verify: bool = False) -> Any:
        return self.bridge.save_hf_pretrained(model, folder, show_progress=False, verify=verify)


def make_subject(config: Config, folder: Path) -> Subject:
    """Returns the model of `folder`'s config.json; writes random weights beside it if there are none. Every rank calls it."""
    made = Subject(config, folder, AutoBridge.from_hf_pretrained(folder, dtype=config.model.dtype))
    plan = made.bridge.plan(made.fresh())
    collectives.on_rank_zero("writing random weights", lambda: _write_weights(plan, folder))
    return made


def _write_weights(plan: Plan, folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    shards = plan_shards(folder, plan.tensors, "1GB")
    for shard in shards:
        tensors = {name: torch.empty(info.shape, dtype=info.dtype).uniform_(-0.05, 0.05) for name, info in shard.tensors.items()}
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    write_index(folder, shards)
    peers.sync_files(folder)


@dataclass
class Clock:
    """The best time of each measurement, in seconds."""

    best: dict[str, float] = field(default_factory=dict)

    def time[T](self, name: str, work: Callable[[], T]) -> T:
        """Runs and times `work` on all ranks at once. Every rank calls it."""
        _meet()
        begin = time.perf_counter()
        result = work()
        _meet()
        seconds = time.perf_counter() - begin
        self.best[name] = min(seconds, self.best.get(name, seconds))
        return result

    def note(self, name: str, seconds: float) -> None:
        self.best[name] = min(seconds, self.best.get(name, seconds))


def _meet() -> None:
    if not platform.is_cpu():
        torch.cuda.synchronize()
    dist.barrier()


@contextmanager
def anonymous_peak() -> Iterator[Callable[[], int]]:
    """Watches in the block how far this process's anonymous memory rises; the yielded function returns the peak in bytes."""
    gc.collect()  # memory freed in the block would hide what is allocated
    start, peak = _anonymous(), 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, _anonymous() - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        ended.set()
        watcher.join()


def _anonymous() -> int:
    """Returns the bytes of resident anonymous memory (proc(5), RssAnon)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]) << 10


def main(config: Config) -> None:
    """Every rank calls it, in running process groups. Rank 0 writes result.json to the run directory."""
    options = config.recipe.options
    config.model.load_weights = False
    subject = make_subject(config, Path(options["source"]))
    narrow = make_subject(config, Path(options["narrow"]))
    topology = process_groups.current()
    assert topology is not None
    own = peers.Groups(topology)
    out = Path(config.run_dir) / "out"
    collectives.on_rank_zero("making a folder", lambda: out.parent.mkdir(parents=True, exist_ok=True))
    clock = Clock()
    for _ in range(config.bench.repeats):
        _time_import(clock, subject, own)
    model = subject.fresh()
    clock.note("import verification", subject.load(model, verify=True).verify_seconds)
    saved = _transformers_model(subject) if topology.world_size == 1 else None
    for _ in range(config.bench.repeats):
        _time_export(clock, subject, model, own, out)
        if saved is not None:
            _time_transformers(clock, subject, saved, out)
    del saved
    result = {
        "seconds": clock.best,
        "bytes": sum(info.nbytes for info in find_tensors(subject.folder).values()),
        "tensors": len(subject.bridge.plan(model).tensors),
        **_watched(subject, model, own, out),
        "cpu_microseconds_per_tensor": _cpu_per_tensor(narrow, out),
    }
    collectives.on_rank_zero("writing the result", lambda: (out.parent / "result.json").write_text(json.dumps(result, indent=2)))


def _time_import(clock: Clock, subject: Subject, own: peers.Groups) -> None:
    model, other = subject.fresh(), subject.fresh()
    plan = clock.time("plan", lambda: subject.bridge.plan(model))
    source = peers.block(plan.owned_bytes, platform.device())
    clock.time("plain copy", lambda: peers.copy(source, plan.owned_bytes, platform.device()))
    clock.time("import", lambda: subject.load(model))
    infos, other_plan = find_tensors(subject.folder), subject.bridge.plan(other)
    clock.time("import of whole tensors", lambda: peers.import_whole(other_plan, infos, own))


def _time_export(clock: Clock, subject: Subject, model: Model, own: peers.Groups, out: Path) -> None:
    plan = subject.bridge.plan(model)
    size = sum(info.nbytes for info in find_tensors(subject.folder).values())
    source = peers.block(size, torch.device("cpu"))
    clock.time("plain write", lambda: peers.write(source, size, out) if dist.get_rank() == 0 else None)
    _remove(out)
    clock.time("export", lambda: subject.save(model, out))
    _remove(out)
    clock.note("export verification", subject.save(model, out, verify=True).verify_seconds)
    _remove(out)
    shards = plan_shards(out, plan.tensors)
    clock.time("export of whole tensors", lambda: peers.export_whole(plan, shards, own))
    _remove(out)
    clock.time("stream", lambda: _stream(subject, model))


def _stream(subject: Subject, model: Model) -> None:
    """Streams every tensor to every rank, which drops it."""
    with closing(subject.bridge.export_hf_weights(model, show_progress=False)) as tensors:
        for _ in tensors:
            pass


def _transformers_model(subject: Subject) -> Any:
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {} if platform.is_cpu() else {"device_map": {"": platform.device()}}
    model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype="auto", **where)
    if platform.is_cpu():  # transformers leaves parameters in the mapped file; ours have their own memory
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def _time_transformers(clock: Clock, subject: Subject, saved: Any, out: Path) -> None:
    clock.time("from_pretrained", lambda: _transformers_model(subject))

    def save() -> None:
        saved.save_pretrained(out)
        peers.sync_files(out)

    clock.time("save_pretrained", save)
    _remove(out)


def _remove(out: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    dist.barrier()


def _watched(subject: Subject, model: Model, own: peers.Groups, out: Path) -> dict[str, Any]:
    """Returns memory beside the model, collectives after planning, and bytes read, for our conversion and that of whole tensors."""
    plan, infos = subject.bridge.plan(model), find_tensors(subject.folder)
    shards = plan_shards(out, plan.tensors)
    conversions: dict[str, Callable[[], Any]] = {
        "import": lambda: subject.load(model),
        "import of whole tensors": lambda: peers.import_whole(plan, infos, own),
        "export": lambda: subject.save(model, out),
        "export of whole tensors": lambda: peers.export_whole(plan, shards, own),
        "stream": lambda: _stream(subject, model),
    }
    peaks, communication, read = {}, {}, {}
    for name, convert in conversions.items():
        with anonymous_peak() as peak, counted() as calls:
            result = convert()
        every = collectives.all_gather((peak(), calls.objects, calls.tensors))
        peaks[name] = max(entry[0] for entry in every)
        communication[name] = {"objects": max(entry[1] for entry in every), "tensors": max(entry[2] for entry in every)}
        if name == "import":
            read[name] = result.bytes_copied / collectives.world_size()
        elif name == "import of whole tensors":
            read[name] = sum(collectives.all_gather(result)) / collectives.world_size()
        elif name.startswith("export"):
            _remove(out)
    owned = sum(collectives.all_gather(plan.owned_bytes)) / collectives.world_size()
    return {"anonymous_peak": peaks, "collectives": communication, "bytes_read_per_rank": {**read, "owned": owned}}


def _cpu_per_tensor(narrow: Subject, out: Path) -> dict[str, float]:
    """Returns the slowest rank's CPU time per tensor in microseconds, for a narrow model, whose bytes cost next to nothing."""
    model = narrow.fresh()
    found: dict[str, float] = {}
    conversions: dict[str, Callable[[], Any]] = {
        "plan": lambda: narrow.bridge.plan(model),
        "import": lambda: narrow.load(model),
        "export": lambda: narrow.save(model, out),
    }
    for name, convert in conversions.items():
        begin = time.process_time()
        convert()
        found[name] = max(collectives.all_gather(time.process_time() - begin))
    _remove(out)
    count = len(narrow.bridge.plan(model).tensors)
    return {name: seconds / count * 1e6 for name, seconds in found.items()}
