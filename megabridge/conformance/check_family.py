"""Checks a family with its tiny model: bijection of names, byte identity, logits and gradients.

`check_tiny_model` runs in the process groups of one layout; `check_family` goes through all layouts of the running processes by
stopping and starting megatron-core's groups.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config.schema import Config
from megabridge.conformance.check_config import check_config
from megabridge.conformance.findings import Finding, failed, over_ranks, problems_of
from megabridge.conformance.layouts import legal_layouts
from megabridge.conformance.tiny_model import GRADIENTS, Reference, read_reference, tiny_config, write_tiny_model
from megabridge.conversion import verify
from megabridge.conversion.plan import Plan
from megabridge.errors import MegabridgeError, ParityError, listed
from megabridge.families import Family
from megabridge.families.core.quantization import KEY
from megabridge.hf import assets
from megabridge.hf.quantised_weights import find_weights
from megabridge.hf.tensor_files import Reader, find_tensors, native_box
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.models.logits import gather_logits
from megabridge.parallel import collectives, process_groups
from megabridge.training import build
from megabridge.training.step import Batch, forward_backward

from megatron.core import parallel_state

LAYERS: Final = 5
"""Layers of a tiny model: no pipeline size from 2 to 4 divides it."""
LOGITS_TOLERANCE: Final = 1e-4
"""Largest difference of fp32 logits relative to the largest logit: sums in another order give about 1e-6."""
GRADIENT_TOLERANCE: Final = 1e-3
"""Largest difference of a tensor's gradient relative to the largest gradient in the tensor."""
LEAST_SPREAD: Final = 0.02
"""Smallest `Reference.spread` for which a comparison of logits means anything."""
Chunks = list[torch.nn.Module]


def check_family(config: Config, family: Family, folder: Path, world_size: int, say: Callable[[str], None]) -> list[Finding]:
    """Runs all checks on the family's tiny model in `folder`, under every legal layout of `world_size` ranks. Collective.

    Leaves the groups of the last layout running. `say` is called with a line per layout.
    """
    hf = tiny_config(family, LAYERS)
    found = [check_config(family, {**family.tiny, "model_type": family.model_type}, "tiny config")]
    try:
        collectives.on_rank_zero("making the tiny model", lambda: write_tiny_model(folder, hf, family, ranks=world_size).exists())
        tiny = tiny_model_config(config, folder)
        layouts = legal_layouts(tiny, AutoBridge.from_hf_pretrained(folder), world_size)
    except MegabridgeError as error:
        return [*found, failed("tiny model", "reference", error)]
    for layout in layouts:
        process_groups.change(layout.topology, seed=config.seed)
        say(f"{family.architecture}, tiny model: {layout}")
        export = folder.parent / f"{folder.name}-{layout}"
        seen = over_ranks(check_tiny_model(layout.config(tiny), layout, folder, export))
        if collectives.rank() == 0:
            shutil.rmtree(export, ignore_errors=True)
        gc.collect()  # models contain reference cycles
        found += seen
        if layout is layouts[0] and not all(finding.has_passed for finding in seen if finding.what in ("bijection", "forward")):
            break  # the other layouts would fail in the same way, only slower
    return found


def tiny_model_config(config: Config, folder: Path) -> Config:
    """Returns `config` for the tiny model in `folder`, in float32."""
    return replace(config, model=replace(config.model, path=str(folder), dtype="float32", load_weights=True, hf={}, revision=None))


def check_tiny_model(config: Config, layout: ParallelLayout, folder: Path, target: Path) -> list[Finding]:
    """Checks the tiny model in `folder` under the running layout and exports it to `target`. Collective.

    Returns this rank's findings.
    """
    where, reference = str(layout), read_reference(folder)
    try:
        bridge = build.bridge(config)
        provider = build.provider(config, bridge)
        chunks = provider.provide_distributed_model(ddp_config={"use_distributed_optimizer": False}, init=build.init(config))
    except MegabridgeError as error:
        return [failed(where, "bijection", error)]
    plan = bridge.plan(chunks)
    found = [
        Finding(where, "bijection", f"{len(plan.tensors)} tensors"),
        _check_bytes(bridge, chunks, where, folder, target),
    ]
    try:
        return [*found, _check_logits(chunks, where, reference), _check_gradients(chunks, plan, where, folder, reference)]
    except Exception as error:
        if isinstance(error, torch.distributed.DistError) or parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise ParityError(f"{where}: {type(error).__name__}: {error}") from error  # the other ranks wait for this one
        return [*found, failed(where, "forward", error)]


def _check_bytes(bridge: AutoBridge, chunks: Chunks, where: str, folder: Path, target: Path) -> Finding:
    try:
        report = bridge.save_hf_pretrained(chunks, target, show_progress=False, weight_dtype="source")
        problems = folder_differences(folder, target)
    except MegabridgeError as error:
        return failed(where, "bytes", error)
    return Finding(where, "bytes", f"{report.bytes:,}", tuple(problems))


def folder_differences(source: Path, target: Path) -> list[str]:
    """Returns a line for each difference of names, dtypes, shapes, bytes and config.json between two folders. Collective.

    A quantised source is compared as the bfloat16 that it decodes to.
    """
    return [
        *verify.against_source(target, source),
        *collectives.on_rank_zero("comparing folders", lambda: _headings(source, target)),
    ]


def _headings(source: Path, target: Path) -> list[str]:
    ours, theirs = find_tensors(target), find_weights(source)
    problems = [
        f"{name} is {theirs[name].dtype}, exported as {info.dtype}"
        for name, info in ours.items()
        if name in theirs and info.dtype != theirs[name].dtype
    ]
    if {key: value for key, value in assets.read_config(source).items() if key != KEY} != assets.read_config(target):
        problems.append("config.json: other keys or values in the export")
    return problems


def _check_logits(chunks: Chunks, where: str, reference: Reference) -> Finding:
    logits = gather_logits(chunks, reference.prompt).cpu()
    distance = float((logits - reference.logits).abs().max() / reference.logits.abs().max())
    problems = []
    if not distance <= LOGITS_TOLERANCE:
        problems.append(
            f"differ from transformers' by {distance:.1e} of the largest, more than {LOGITS_TOLERANCE:g}; see recipe=compare"
        )
    if reference.spread < LEAST_SPREAD:
        problems.append(f"are all alike ({reference.spread:.1e}), so that a comparison means nothing; change the tiny config")
    return Finding(where, "logits", f"{distance:.1e}", tuple(problems))


def _check_gradients(chunks: Chunks, plan: Plan, where: str, folder: Path, reference: Reference) -> Finding:
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    forward_backward(chunks, _micro_batches(reference.rows), forward_only=False)
    wrong, largest = gradient_differences(plan, folder / GRADIENTS)
    problems = [f"{name} differs from transformers' by {distance:.1e} of its largest" for name, distance in wrong.items()]
    return Finding(where, "gradients", f"{largest:.1e}", (listed(problems),) if problems else ())


def _micro_batches(rows: Tensor) -> list[Batch]:
    """Returns this data-parallel rank's rows in the fewest micro-batches that accumulate gradients and fill a pipeline twice."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = rows[rank::size]
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    count = next((count for count in range(2 * stages, len(own), stages) if len(own) % count == 0), len(own))
    return [
        {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "position_ids": torch.arange(part.shape[1] - 1).expand(len(part), -1),
            "loss_mask": torch.ones(len(part), part.shape[1] - 1),
        }
        for part in own.chunk(count)
    ]


def gradient_differences(plan: Plan, gradients: Path) -> tuple[dict[str, float], float]:
    """Returns the tensors whose gradient on this rank is wrong, and the largest difference, relative to each tensor's largest.

    `gradients` is a folder with transformers' gradients under the tensors' published names; ours are in `main_grad`. Differences of
    gradients below 1e-4 of the overall largest, which are only rounding, are relative to that.
    """
    infos = find_tensors(gradients)
    wrong: dict[str, float] = {}
    worst = 0.0
    with Reader(infos.values()) as reader:
        sizes = {name: float(reader.mapped(info).abs().max()) for name, info in infos.items() if name in plan.tensors}
        floor = 1e-4 * max(sizes.values())
        for item in (item for item in plan.items if isinstance(item.local.parameter, torch.nn.Parameter)):  # buffers have none
            gradient: Any = vars(item.local.parameter).get("main_grad")
            for transfer in item.transfers:
                name = item.hf[transfer.part]
                if gradient is None or name not in sizes:
                    wrong[name] = float("inf")
                    continue
                theirs = reader.box(infos[name], transfer)
                distance = float((native_box(gradient, transfer).cpu() - theirs).abs().max()) / max(sizes[name], floor)
                worst = max(worst, distance)
                if not distance <= GRADIENT_TOLERANCE:
                    wrong[name] = max(distance, wrong.get(name, 0.0))
    return wrong, worst


def verdict(subject: str, findings: Sequence[Finding]) -> str | None:
    """Returns one text with all failures, or None when everything passed."""
    bad = [finding for finding in findings if not finding.has_passed]
    if not bad:
        return None
    return f"{len(bad)} of {len(findings)} checks of {subject} failed:\n  " + "\n  ".join(problems_of(bad))
