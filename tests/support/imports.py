"""What ranks do in the tests of imports: ways of reading, faults, broken rules."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabridge import AutoBridge
from megabridge.bridge import weights
from megabridge.conformance.layer_parity import compare_folder
from megabridge.conformance.pairing import LOGITS
from megabridge.conversion import read_loop, shared_reads
from megabridge.conversion.parameters import collect_parameters
from megabridge.errors import MegabridgeError
from megabridge.families.core.family import Family
from megabridge.hf.tensor_files import Reader, find_tensors
from megabridge.mapping import Fuse, Rule, Same, WeightMap
from tests.support.convert import provide
from tests.support.models import TINY, prompt


def digest(model: list[torch.nn.Module]) -> str:
    """Of every bit of this rank's parameters."""
    found = hashlib.sha256()
    for chunk in model:
        for parameter in chunk.parameters():
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def small_window() -> Iterator[None]:
    """A ring of three slots of 16 KiB, so that a small model goes round it many times."""
    before = shared_reads.SLOT, shared_reads.SLOTS
    shared_reads.SLOT, shared_reads.SLOTS = 16 << 10, 3  # type: ignore[misc]
    try:
        yield
    finally:
        shared_reads.SLOT, shared_reads.SLOTS = before  # type: ignore[misc]


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """What every positioned read inside brought."""
    counts: list[int] = []
    real = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        counts.append(real(fd, buffers, offset))
        return counts[-1]

    os.preadv = counted  # type: ignore[assignment]
    try:
        yield counts
    finally:
        os.preadv = real


def ways(source: str) -> list[dict[str, Any]]:
    """One import per way of reading: what this rank holds, and what was counted."""
    bridge = AutoBridge.from_hf_pretrained(source)
    out = []
    for settings in ({"reader": "mapped"}, {"reader": "sequential"}, {"dedupe": True}):
        model = provide(bridge, load_weights=False)
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.data.fill_(torch.nan)
        with small_window(), bytes_read() as counts:
            report = bridge.load_hf_weights(model, show_progress=False, verify=False, **settings)
            read = sum(counts)
            verified = bridge.load_hf_weights(model, show_progress=False, **settings)
        out.append(
            {
                "digest": digest(model),
                "copied": report.copied_by_rank,
                "fetched": report.fetched_by_node,
                "owned": bridge.plan(model).owned_bytes,
                "read": read,
                "largest": max(counts),
                "verified": verified.is_verified and verified.mismatched == (),
                "left": list(Path("/dev/shm").glob("megabridge-*")),
            }
        )
    return out


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def memory(root: str) -> list[dict[str, int]]:
    """Per dtype of the parameters and way of reading: the model's bytes, and the most memory of an import beside them."""
    read_loop.threads_of_a_rank = lambda: read_loop._MOST_THREADS
    config = {
        **TINY,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 3,
        "vocab_size": 60_000,
        "dtype": "bfloat16",
    }
    (Path(root) / "config.json").write_text(json.dumps(config))
    out = []
    for dtype in ("bfloat16", "float32"):
        bridge = AutoBridge.from_hf_pretrained(root, dtype=dtype)
        model = provide(bridge, load_weights=False)
        if dtype == "bfloat16":
            bridge.save_hf_weights(model, Path(root) / "weights", show_progress=False, verify=False)
            (Path(root) / "weights" / "config.json").write_text(json.dumps(config))
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.data.fill_(1.0)  # its pages exist from here on
        for way in ("mapped", "sequential"):
            before, samples, ended = anonymous(), [0], threading.Event()

            def sample(samples: list[int] = samples, ended: threading.Event = ended) -> None:
                while not ended.wait(0.001):
                    samples.append(anonymous())

            sampler = threading.Thread(target=sample)
            sampler.start()
            bridge.load_hf_weights(model, Path(root) / "weights", show_progress=False, reader=way)
            ended.set()
            sampler.join()
            size = sum(parameter.nbytes for chunk in model for parameter in chunk.parameters())
            out.append({"extra": max(*samples, before) - before, "model": size})
    return out


def caught(work: Any) -> tuple[str, str, float]:
    """(error type, message, seconds) of `work()`."""
    begin = time.monotonic()
    try:
        work()
    except MegabridgeError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def refusals(folders: list[dict[str, Any]]) -> list[tuple[str, str, float, bool]]:
    """(error type, message, seconds, whether any parameter changed) of loading each folder into a model of its config."""
    out = []
    for given in folders:
        settings = dict(given)
        source, dtype = settings.pop("source"), settings.pop("dtype", None)
        mine = source[dist.get_rank()] if isinstance(source, list) else source
        models: list[Any] = []

        def work(mine: str = mine, dtype: Any = dtype, settings: Any = settings, models: Any = models) -> None:
            bridge = AutoBridge.from_hf_pretrained(mine, dtype=dtype)
            model = provide(bridge, load_weights=False)
            models.append((model, digest(model)))
            bridge.load_hf_weights(model, show_progress=False, **settings)

        kind, message, seconds = caught(work)
        out.append((kind, message, seconds, any(digest(model) != before for model, before in models)))
    return out


def shared_read_fails(source: str) -> list[tuple[str, str, float]]:
    """Rank 1 can't read, in each way: what this rank raises."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, load_weights=False)
    real = os.preadv

    def broken(fd: int, buffers: Any, offset: int) -> int:
        if dist.get_rank() == 1 and offset > 30_000:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    os.preadv = broken  # type: ignore[assignment]
    try:
        with small_window():
            return [
                caught(lambda dedupe=dedupe: bridge.load_hf_weights(model, show_progress=False, dedupe=dedupe, reader="sequential"))
                for dedupe in (True, False)
            ]
    finally:
        os.preadv = real


def changed_while_loading(source: str, how: str) -> tuple[str, str, float]:
    """The file is truncated or replaced after its header was read, before its tensors are."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, load_weights=False)
    file = Path(source) / "model.safetensors"
    opened = weights.find_weights

    def and_change(*args: Any, **kwargs: Any) -> Any:
        infos = opened(*args, **kwargs)
        dist.barrier()
        if dist.get_rank() == 0:
            if how == "truncated":
                os.truncate(file, file.stat().st_size // 2)
            else:
                copy = file.with_suffix(".copy")
                copy.write_bytes(file.read_bytes())
                copy.rename(file)
        dist.barrier()
        return infos

    weights.find_weights = and_change
    return caught(lambda: bridge.load_hf_weights(model, show_progress=False))


def killed_by_a_truncated_file(source: str) -> None:
    """Rank 1 copies out of a mapping whose file has just been truncated."""
    if dist.get_rank() == 1:
        infos = find_tensors(Path(source))
        with Reader(infos.values(), way="mapped") as reader:
            tensor = reader.mapped(max(infos.values(), key=lambda info: info.start))
            os.truncate(Path(source) / "model.safetensors", 64)
            tensor.sum()
    dist.barrier()


def localised(good: str, bad: list[str], file: str) -> list[tuple[float, str | None]]:
    """Of `good` and each model in `bad`, beside transformers with `good`: how far logits are off, and the first module that is."""
    out = []
    for folder in [good, *bad]:
        bridge = AutoBridge.from_hf_pretrained(folder)
        model = provide(bridge, sequence_parallel=torch.distributed.get_world_size() > 1)
        out.append(first_module(bridge, model, good, file))
    return out


def first_module(bridge: AutoBridge, model: list[torch.nn.Module], folder: str, file: str) -> tuple[float, str | None]:
    tokens = prompt(bridge.source.config["vocab_size"], batch=1, length=22)
    found = compare_folder(bridge.plan(model), model, Path(folder), tokens=tokens, dtype="float32", tolerance=1e-4, file=Path(file))
    assert not found.not_compared
    (logits,) = (row.difference for row in found.rows if row.point.module == LOGITS)
    return logits, None if found.fault is None else found.fault.module


def mutations(rule: Rule) -> Iterator[tuple[str, Rule]]:
    """The rule broken once in every way that fits its kind."""
    yield "wrong name", replace(rule, hf=(rule.hf[0] + "x", *rule.hf[1:]))
    if len(rule.hf) > 1:
        yield "first two parts swapped", replace(rule, hf=(rule.hf[1], rule.hf[0], *rule.hf[2:]))
        yield "last two parts swapped", replace(rule, hf=(*rule.hf[:-2], rule.hf[-1], rule.hf[-2]))
    if isinstance(rule.layout, Fuse):
        yield "wrong ratio", replace(rule, layout=replace(rule.layout, ratio=(3, *rule.layout.ratio[1:])))
        groups: int | str = 1 if rule.layout.groups != 1 else 2
        ratio: tuple[int | str, ...] = ("num_attention_heads", "num_query_groups", "num_query_groups") if groups == 1 else (1, 1)
        yield "wrong groups", replace(rule, layout=Fuse(groups, ratio))
    if isinstance(rule.layout, Same) and rule.layout.rows:
        yield "wrong rows", replace(rule, layout=Same("hidden_size"))
    if "norm" in rule.native[0] and "layers" in rule.native[0]:
        other = "post_attention_layernorm" if "input" in rule.native[0] else "input_layernorm"
        yield "another tensor", replace(rule, hf=(f"model.layers.{{layer}}.{other}.weight",))


def broken_rules(source: str, file: str) -> list[tuple[str, str, list[str], str, str | None]]:
    """(native name, mutation, names of layer 0 on both sides, error, first module that differs) of every rule of the family broken once."""
    bridge = AutoBridge.from_hf_pretrained(source)
    source_of = bridge.source
    whole: Family = source_of.family
    model = provide(bridge)
    here = {re.sub(r"(?<=layers\.)\d+", "{layer}", live.name) for live in collect_parameters(model)}
    out = []
    for number, rule in enumerate(whole.weights.rules):
        if not here & set(rule.native):
            continue  # of another backend's, or another norm's, parameter
        for name, broken in [*mutations(rule), ("none", rule)][: None if number == 0 else -1]:
            rules = (*whole.weights.rules[:number], broken, *whole.weights.rules[number + 1 :])
            bridge.source, bridge.state.plan = replace(source_of, family=replace(whole, weights=WeightMap(rules))), None
            _, message, _ = caught(lambda: bridge.load_hf_weights(model, show_progress=False))
            bridge.source, bridge.state.plan = source_of, None
            place = None if message else first_module(bridge, model, source, file)[1]
            tensors = [tensor.format(layer=0) for tensor in dict.fromkeys((*rule.native, *rule.hf, *broken.hf))]
            out.append((rule.native[0], name, tensors, message, place))
    return out
