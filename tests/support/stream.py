"""What ranks do in the tests of streaming."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabridge import AutoBridge
from megabridge.config.schema import OptimizerConfig, SchedulerConfig
from megabridge.conversion.stream import Stream
from megabridge.errors import MegabridgeError
from megabridge.training import build_optimizer
from tests.support.bridge import refusal
from tests.support.convert import provide
from tests.support.models import write_model

SMALL = 40_000  # bytes of a bucket: a tiny model makes several
Seen = list[tuple[str, str, tuple[int, ...], str]]


def write_models(root: Path, configs: dict[str, dict[str, Any]]) -> None:
    for seed, (name, config) in enumerate(configs.items()):
        write_model(root / name, config, seed)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def seen(pairs: Any) -> Seen:
    """Name, dtype, shape and digest of every tensor, taken after the stream ended; each must own tight storage."""
    held = list(pairs)
    for name, tensor in held:
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in held}) == len(held)
    return [(name, str(tensor.dtype), tuple(tensor.shape), digest(tensor)) for name, tensor in held]


def usable() -> bool:
    """Whether the ranks still understand each other."""
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item() == dist.get_world_size()


def bucketed(bridge: AutoBridge, model: Any, **options: Any) -> Seen:
    out = []
    for flat, entries in bridge.export_hf_buckets(model, bucket_bytes=SMALL, **options):
        assert flat.dtype == torch.uint8 and (flat.numel() <= SMALL or len(entries) == 1)
        assert all(entry.view(flat).data_ptr() == flat.data_ptr() + entry.offset for entry in entries)
        out += [(entry.name, str(entry.dtype), entry.shape, digest(entry.view(flat))) for entry in entries]
    return out


def from_shards(bridge: AutoBridge, model: Any) -> Seen:
    """Every rank's shards, put together; each must come from one rank alone."""
    calls = Counter[str]()
    with counted(calls):
        own = [(name, box, local.clone()) for name, box, local in bridge.export_hf_shards(model)]
        more = list(bridge.export_hf_shards(model, replicas=True))
    assert not calls and len(more) >= len(own)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    whole: dict[str, torch.Tensor] = {}
    filled: Counter[str] = Counter()
    for name, box, local in (shard for rank in everyone for shard in rank):
        box.view(whole.setdefault(name, torch.empty(box.whole, dtype=local.dtype))).copy_(local)
        filled[name] += local.numel()
        assert sum(run.size for run in box.runs) <= sum(box.whole)
    assert all(filled[name] == tensor.numel() for name, tensor in whole.items())
    return [(name, str(tensor.dtype), tuple(tensor.shape), digest(tensor)) for name, tensor in whole.items()]


@contextmanager
def counted(calls: Counter[str]) -> Iterator[None]:
    """Counts every exchange between ranks by name."""
    names = [name for name in dir(dist) if name.startswith(("all_", "broadcast", "gather", "scatter", "reduce", "send", "recv", "isend", "irecv", "batch_", "barrier")) and callable(getattr(dist, name))]  # fmt: skip
    real = {name: getattr(dist, name) for name in names}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, wrap(name))
    try:
        yield
    finally:
        for name in names:
            setattr(dist, name, real[name])


def streams(sources: list[str]) -> list[dict[str, Any]]:
    """Each model through every way out of the bridge."""
    out = []
    last = dist.get_world_size() - 1
    for source in sources:
        bridge = AutoBridge.from_hf_pretrained(source)
        model = provide(bridge)
        tasks = bridge.get_conversion_tasks(model)
        some = tasks[::-2]
        out.append(
            {
                "whole": seen(bridge.export_hf_weights(model, show_progress=False)),
                "small": seen(bridge.export_hf_weights(model, cpu=True, show_progress=False, bucket_bytes=SMALL)),
                "single": seen(bridge.export_hf_weights(model, show_progress=False, bucket_bytes=1, consumers=[last])),
                "buckets": bucketed(bridge, model),
                "some consumers": bucketed(bridge, model, consumers={0, last}),
                "bf16": seen(bridge.export_hf_weights(model, show_progress=False, weight_dtype="bfloat16", bucket_bytes=SMALL)),
                "some": seen(bridge.export_hf_weights(model, show_progress=False, conversion_tasks=some, bucket_bytes=SMALL)),
                "shards": from_shards(bridge, model),
                "tasks": [(t.hf_name, str(t.dtype), t.shape, t.nbytes, t.global_param_names, t.source_ranks) for t in tasks],
                "live": [t.param_weight is not None and dict(t.megatron_module.named_parameters())[t.param_name.rpartition(".")[2]] is t.param_weight for t in tasks],
                "some names": [t.hf_name for t in some],
            }
        )  # fmt: skip
    return out


def exchanges(source: str) -> dict[str, Any]:
    """What travels while a stream runs, and when."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    bridge.plan(model)
    starting, running, first = Counter[str](), Counter[str](), Counter[str]()
    with counted(starting):
        stream = bridge.export_hf_buckets(model, bucket_bytes=SMALL)
    buckets = []
    with counted(running):
        for _, entries in stream:
            first = first or Counter(running)
            buckets.append(len(entries))
    return {"starting": dict(starting), "running": dict(running), "first": dict(first), "buckets": buckets}


def changed(source: str, out: str) -> list[Seen]:
    """The stream after an optimizer step and after parameters got new storage; exports of a fresh bridge go to `out`."""
    from megabridge.training.step import prepare

    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, wrap_with_ddp=True, calculate_per_token_loss=True)
    optimizer, _ = build_optimizer(model, OptimizerConfig(lr=0.1), SchedulerConfig(name="constant"), steps=10)
    prepare(model, optimizer)
    plan = bridge.plan(model)
    looks = []

    def look() -> None:
        looks.append(seen(bridge.export_hf_weights(model, show_progress=False, bucket_bytes=SMALL)))
        assert bridge.plan(model).tensors is plan.tensors  # planned once
        fresh = AutoBridge.from_hf_pretrained(source)
        fresh.state.record = bridge.state.record
        fresh.save_hf_weights(model, Path(out) / str(len(looks)), show_progress=False)

    look()
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(0.5)
    optimizer.step()
    look()
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data = parameter.data * 2
    look()
    for chunk in model:
        for parameter in chunk.parameters():
            wide = torch.zeros((*parameter.shape[:-1], 2 * parameter.shape[-1]))
            wide[..., ::2] = parameter.data * 3
            with torch.no_grad():
                parameter.set_(wide.untyped_storage(), 0, parameter.shape, (*wide.stride()[:-1], 2))
            assert not parameter.is_contiguous() or parameter.shape[0] == 1
    look()
    return looks


Steps = Callable[[], None]


def endings(source: str) -> dict[str, tuple[str, int, float]]:
    """How each early end looks here: what was raised, tensors got, seconds; the groups must work after each."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    bridge.plan(model)
    rank, out = dist.get_rank(), {}
    got: list[str] = []

    def consume(most: int | None = None, **options: Any) -> None:
        with closing(bridge.export_hf_weights(model, show_progress=False, bucket_bytes=SMALL, **options)) as stream:
            for name, _ in stream:
                got.append(name)
                if len(got) == most:
                    return

    def fail(in_name: str, at: int, **options: Any) -> None:
        """One rank fails in a method of the stream, the `at`th time."""
        count, real = 0, getattr(Stream, in_name)

        def broken(self: Stream, *args: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and rank == 1:
                raise MemoryError("no memory left")
            return real(self, *args)

        setattr(Stream, in_name, broken)
        try:
            consume(**options)
        finally:
            setattr(Stream, in_name, real)

    def body() -> None:
        try:
            for name, _ in bridge.export_hf_weights(model, show_progress=False, bucket_bytes=SMALL):
                got.append(name)
                if rank == 2 and len(got) == 3:
                    raise ZeroDivisionError("in the loop")
        except ZeroDivisionError:
            got.append("caught")

    def dropped() -> None:
        stream = bridge.export_hf_weights(model, show_progress=False, bucket_bytes=SMALL)
        if rank == 3:
            del stream
            gc.collect()
        else:
            got.extend(name for name, _ in stream)

    def collected() -> None:
        stream = bridge.export_hf_buckets(model, bucket_bytes=SMALL)
        got.extend(entry.name for entry in next(stream)[1])
        if rank != 1:
            for _, entries in stream:
                got.extend(entry.name for entry in entries)

    def held() -> None:
        """The loop's exception is caught while a name still holds the stream: closing it is what ends it."""
        stream = bridge.export_hf_weights(model, show_progress=False, bucket_bytes=SMALL)
        with closing(stream):
            for number, _ in enumerate(stream):
                if rank == 0 and number == 1:
                    break

    sizes = [len(entries) for _, entries in bridge.export_hf_buckets(model, bucket_bytes=SMALL)]
    assert len(sizes) >= 4
    total, before_last = sum(sizes), sum(sizes[:-1])
    cases: dict[str, Steps] = {
        "closed": lambda: consume(1 if rank == 1 else None),
        "closed in the third last bucket": lambda: consume(before_last - sizes[-2] if rank == 1 else None),
        "closed in the last bucket but one": lambda: consume(before_last if rank == 1 else None),
        "closed in the last bucket": lambda: consume(total - 1 if rank == 1 else None),
        "closed after the last": lambda: consume(total if rank == 1 else None),
        "closed by all": lambda: consume(5),
        "closed by the consumer": lambda: consume(2, consumers=[2]),
        "closed by one consumer": lambda: consume(2 if rank == 0 else None, consumers=[0, 2]),
        "dropped unused": dropped,
        "collected": collected,
        "raised in the loop": body,
        "held": held,
        "packing": lambda: fail("_pack", 3),
        "packing the first": lambda: fail("_pack", 1, consumers=[0]),
        "joining": lambda: fail("_join", 2),
        "joining the last": lambda: fail("_join", len(sizes)),
        "landing the last": lambda: fail("_copy_to_host", len(sizes)),
        "dtypes differ": lambda: consume(weight_dtype=torch.bfloat16 if rank == 2 else None),
        "bucket size": lambda: consume(bucket_bytes=0) if rank == 3 else consume(),
        "consumers": lambda: consume(consumers=[4]),
    }
    for name, case in cases.items():
        got.clear()
        begin = time.monotonic()
        if name == "bucket size":
            message = refusal(lambda: list(bridge.export_hf_buckets(model, bucket_bytes=0 if rank == 3 else SMALL)))
        else:
            try:
                message = refusal(case)
            except MemoryError as error:
                message = f"own MemoryError: {error}"
        out[name] = (message, len(got), time.monotonic() - begin)
        assert usable(), name
    out["whole again"] = ("", len(seen(bridge.export_hf_weights(model, show_progress=False))), 0.0)
    return out


def peak(config: dict[str, Any], bucket_bytes: int) -> tuple[int, int, int]:
    """Bytes: growth of this process's greatest memory in a stream, the largest tensor, all tensors."""
    # What is freed goes back to the system at once, so that the stream is measured and not what malloc keeps (malloc.h: -3).
    assert ctypes.CDLL(None).mallopt(-3, 1 << 20) == 1
    bridge = AutoBridge.from_hf_config(config)
    model = provide(bridge, load_weights=False)
    tasks = bridge.get_conversion_tasks(model)
    one = [task for task in tasks if task.shape == (config["hidden_size"],)]

    def run(**options: Any) -> None:
        for _, tensor in bridge.export_hf_weights(model, show_progress=False, bucket_bytes=bucket_bytes, **options):
            tensor.sum()
            del tensor  # or the loop holds two

    run(conversion_tasks=one)  # what is imported and connected once
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before, max(task.nbytes for task in tasks), sum(task.nbytes for task in tasks)


def resident(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def gathered(sources: list[str], out: str, bucket_bytes: int) -> list[dict[str, Any]]:
    """Exports by the shared and the gathering writer; for the second, every rank sees a folder of its own."""
    from megabridge.conversion import gather

    gather.BUCKET_BYTES = bucket_bytes  # type: ignore[misc]
    own = Path(out) / f"rank{dist.get_rank()}"
    reports = []
    for number, source in enumerate(sources):
        bridge = AutoBridge.from_hf_pretrained(source)
        model = provide(bridge)
        options: dict[str, Any] = {"show_progress": False, "weight_dtype": "bfloat16" if number == 1 else None}
        options["max_shard_size"] = "40KB" if number == 0 else "5GB"
        shared = bridge.save_hf_pretrained(model, Path(out) / "shared" / str(number), **options)
        report = bridge.save_hf_pretrained(model, own / str(number), writer="gather", **options)
        reports.append(
            {
                "copied": (shared.bytes_copied, report.bytes_copied),
                "mismatched": report.mismatched,
                "verified": report.is_verified,
                "mine": sorted(path.name for path in own.glob("*")),
            }
        )
    return reports


def gathered_failures(source: str, out: str) -> dict[str, tuple[str, bool]]:
    """What a damaged file, a replica that differs, and ranks that fail look like here; and whether anything was published."""
    from megabridge.conversion import exporter, gather

    gather.BUCKET_BYTES = 3000  # type: ignore[misc]
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    rank, seen = dist.get_rank(), {}
    norms = dict(model[0].named_parameters())["decoder.layers.0.self_attention.linear_proj.weight"]
    real_headers, real_write, real_pack = exporter._headers, exporter.Writer.write, Stream._pack

    def damaged(partial: Path, shard: Any) -> Any:
        file, info = partial / shard.name, shard.tensors["model.norm.weight"]
        data = bytearray(file.read_bytes())
        data[info.start] ^= 1
        file.write_bytes(data)
        return real_headers(partial, shard)

    def full(self: Any, info: Any, *args: Any) -> None:
        if info.name == "model.layers.1.self_attn.q_proj.weight":
            raise OSError(28, "No space left on device")
        real_write(self, info, *args)

    def no_memory(self: Stream, bucket: Any) -> None:
        if rank == 2 and bucket.entries[0].name > "model.layers.1":
            raise MemoryError("no memory left")
        real_pack(self, bucket)

    def attempt(name: str) -> None:
        try:
            message = refusal(lambda: bridge.save_hf_weights(model, Path(out) / "out", show_progress=False, writer="gather"))
        except MemoryError as error:
            message = f"own MemoryError: {error}"
        assert usable()
        seen[name] = message, any(Path(out).glob("*out*"))

    exporter._headers = damaged
    attempt("damaged file")
    exporter._headers = real_headers
    if rank == 3:
        with torch.no_grad():
            norms.view(-1)[5] += 1
    attempt("other replica")
    if rank == 3:
        with torch.no_grad():
            norms.view(-1)[5] -= 1
    exporter.Writer.write = full  # type: ignore[method-assign]
    attempt("full")
    exporter.Writer.write = real_write  # type: ignore[method-assign]
    Stream._pack = no_memory  # type: ignore[method-assign]
    attempt("packing")
    Stream._pack = real_pack  # type: ignore[method-assign]
    seen["writer"] = refusal(lambda: bridge.save_hf_weights(model, Path(out) / "out", writer="carrier pigeon")), False
    return seen


def other_checkpoint(source: str, hf_path: str) -> dict[str, Any]:
    """Tasks of another checkpoint of the architecture, and the tensors they bring; and refusals of foreign tasks."""
    from dataclasses import replace

    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    tasks = bridge.get_conversion_tasks(model, hf_path)
    wrong = [replace(tasks[0], shape=(3,)), replace(tasks[0], hf_name="nothing"), tasks[1], tasks[1]]
    return {
        "tasks": [(task.hf_name, str(task.dtype)) for task in tasks],
        "streamed": seen(bridge.export_hf_weights(model, show_progress=False, conversion_tasks=tasks)),
        "refusal": refusal(lambda: bridge.export_hf_weights(model, conversion_tasks=wrong)),
        "dtype": refusal(lambda: bridge.export_hf_weights(model, weight_dtype="int3")),
        "none": seen(bridge.export_hf_weights(model, show_progress=False, conversion_tasks=[])),
        "error is ours": issubclass(MegabridgeError, Exception),
    }
