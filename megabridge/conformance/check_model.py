"""Checks a real model: its config, the names and shapes of its tensors, and its weights if they fit into memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config.schema import Config
from megabridge.conformance.check_config import check_config
from megabridge.conformance.check_family import LOGITS_TOLERANCE, folder_differences
from megabridge.conformance.findings import Finding, failed, over_ranks
from megabridge.conformance.layouts import legal_layouts
from megabridge.conformance.tiny_model import quiet
from megabridge.conversion.parameters import collect_parameters
from megabridge.conversion.parity import load_hf
from megabridge.conversion.plan import check_source, make_plan
from megabridge.errors import MegabridgeError
from megabridge.families import family_for
from megabridge.hf import resolve
from megabridge.hf.quantised_weights import find_weights
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.models.logits import gather_logits
from megabridge.parallel import collectives, process_groups
from megabridge.parallel.hardware import memory_bytes
from megabridge.training import build

SPARE: Final = 2
"""Number of float32 copies of a model that must fit into memory beside megatron-core's: transformers' own, and a reserve."""


def check_model(config: Config, world_size: int, scratch: Path) -> list[Finding]:
    """Checks a model's files: config.json, headers under every layout, weights and logits. Collective.

    Weights are loaded under the layout with the fewest copies. Without model.path only model.hf is checked. Leaves the groups of
    the last layout running.
    """
    hf = build.model_config(config)
    own = check_config(family_for(hf), hf, "model", ignore=config.model.ignore_keys)
    if config.model.path is None:
        return [own]
    try:
        bridge = build.bridge(config)
        layouts = legal_layouts(config, bridge, world_size)
        folder = resolve.resolve(config.model.path, revision=config.model.revision)
        infos = find_weights(folder)
    except MegabridgeError as error:
        return [own, *([failed("model", "headers", error)] if own.has_passed else [])]
    found = [own]
    for layout in layouts:
        process_groups.change(layout.topology, seed=config.seed)
        found += over_ranks([_check_headers(layout.config(config), bridge, f"model, {layout}", infos)])
    size = sum(info.elements for info in infos.values()) * 4
    if not config.model.load_weights or any(not finding.has_passed for finding in found):
        return found
    layout = min(layouts, key=lambda one: one.topology.dp)
    if (layout.topology.dp + SPARE) * size > memory_bytes():
        note = f"{size / 2**30:.0f} GiB as float32: not loaded"
        return [*found, Finding("model", "weights", note)]
    process_groups.change(layout.topology, seed=config.seed)
    return [*found, *over_ranks(_check_weights(layout.config(config), layout, folder, scratch))]


def _check_headers(config: Config, bridge: AutoBridge, where: str, infos: Mapping[str, TensorInfo]) -> Finding:
    """Checks that the rules, applied to the model on the meta device, consume exactly the tensors in the files' headers."""
    try:
        provider = build.provider(replace(config, model=replace(config.model, load_weights=False)), bridge)
        chunks = provider.provide_distributed_model(wrap_with_ddp=False, init="meta")
        plan = make_plan(bridge.source.family, bridge.source.native, collect_parameters(chunks))
        with collectives.raise_together("comparing headers"):
            check_source(plan, infos)
    except MegabridgeError as error:
        return failed(where, "headers", error)
    return Finding(where, "headers", f"{len(infos)} tensors")


def _check_weights(config: Config, layout: ParallelLayout, folder: Path, scratch: Path) -> list[Finding]:
    """Checks import, export and logits of the real weights, in float32."""
    where = f"model, {layout}"
    config = replace(config, model=replace(config.model, dtype="float32"))
    bridge = build.bridge(config)
    try:
        chunks = build.provider(config, bridge).provide_distributed_model(wrap_with_ddp=False, init="empty")
        exported = bridge.save_hf_pretrained(chunks, scratch, show_progress=False, weight_dtype="source")
        problems = folder_differences(folder, scratch)
    except MegabridgeError as error:
        return [failed(where, "bytes", error)]
    if collectives.rank() == 0:
        shutil.rmtree(scratch)
    found = [Finding(where, "bytes", f"{exported.bytes:,}", tuple(problems))]
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(0, bridge.source.native["vocab_size"], (1, 64), generator=generator)
    ours = gather_logits(chunks, tokens).cpu()

    def distance() -> float:
        quiet()
        with torch.no_grad():
            theirs = load_hf(folder, "float32")(tokens).logits
        return float((ours - theirs).abs().max() / theirs.abs().max())

    difference = collectives.on_rank_zero("comparing logits with transformers", distance)
    text = f"differ from transformers' by {difference:.1e} of the largest; see recipe=compare"
    return [*found, Finding(where, "logits", f"{difference:.1e}", () if difference <= LOGITS_TOLERANCE else (text,))]
