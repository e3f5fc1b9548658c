"""What ranks do in the conformance tests: checks and comparisons of many tiny models in one run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megabridge.config import schema
from megabridge.config.schema import Config
from megabridge.conformance import check_config, check_family, draft, layer_parity, tiny_model
from megabridge.conformance.findings import problems_of
from megabridge.errors import MegabridgeError
from megabridge.families import Family, all_families, register
from megabridge.families.core.fields import Field, FieldLike, Fixed
from megabridge.families.core.parts import LAYER, attention, embeddings, gated_mlp, pre_norms
from megabridge.families.llama import FAMILY
from megabridge.hf.tensor_files import find_tensors
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.mapping import WeightMap, block
from megabridge.parallel import process_groups
from megabridge.training import build

SWAPPED = replace(
    FAMILY,
    weights=WeightMap(
        embeddings(), block(*LAYER, pre_norms("post_attention_layernorm", "input_layernorm"), attention(), gated_mlp())
    ),
)


def make(root: str, architectures: list[str]) -> None:
    for name in architectures:
        family = all_families()[name]
        tiny_model.write_tiny_model(Path(root) / name, tiny_model.tiny_config(family, check_family.LAYERS), family, ranks=4)


def config_of(folder: Path, run_dir: Path, **groups_of: Any) -> tuple[Config, ParallelLayout]:
    """The config of the tiny model in `folder` in the layout that runs; sequence parallel where `sp` says so."""
    topology = process_groups.current()
    assert topology is not None
    layout = ParallelLayout(topology, groups_of.pop("sp", False) and topology.tp > 1)
    values = {"model": {"name": folder.name, "path": None, **groups_of.pop("model", {})}, "run_dir": str(run_dir), **groups_of}
    return layout.config(check_family.tiny_model_config(schema.typed(values), folder)), layout


def comparisons(root: str, out: str, cases: list[tuple[str, dict[str, Any]]], sp: bool = False) -> list[dict[str, Any]]:
    """Per (architecture, provider settings): the points compared and not, and the fault. `swapped` registers SWAPPED first."""
    seen = []
    for number, (name, settings) in enumerate(cases):
        given = dict(settings)
        family: Family = SWAPPED if given.pop("swapped", False) else all_families()[name]
        register(family)
        folder = Path(root) / name
        config, _ = config_of(folder, Path(out), sp=sp, model={"provider": given}, recipe={"seq_length": 48})
        bridge = build.bridge(config)
        provider = build.provider(config, bridge)
        chunks = provider.provide_distributed_model(wrap_with_ddp=False, init="empty")
        found = layer_parity.compare_model(config, bridge, chunks, Path(out) / f"{number}.pt")
        register(FAMILY)
        dist.barrier()
        fault = found.fault
        seen.append(
            {
                "rows": len(found.rows),
                "not_compared": found.not_compared,
                "worst": max(row.difference for row in found.rows),
                "fault": None if fault is None else (fault.module, fault.why),
                "lines": found.lines(),
            }
        )
    return seen


@dataclass(frozen=True)
class Halved(Field):
    """A field that comes back as another value."""

    def write(self, native: Any) -> dict[str, Any]:
        return {self.hf: native[self.native] / 2}


def changed(native: str, field: FieldLike) -> tuple[FieldLike, ...]:
    """Llama's fields, that of `native` replaced."""
    return tuple(field if isinstance(old, Field) and old.native == native else old for old in FAMILY.fields)


WRONG = replace(
    FAMILY,
    fields=(*changed("layernorm_epsilon", Halved("layernorm_epsilon", "rms_norm_eps", 1e-6)), Fixed("residual_multiplier", 0.5)),
)
UNKNOWN = replace(FAMILY, architecture="NobodyForCausalLM", model_type="nobody")
MISSING = replace(FAMILY, weights=WeightMap(embeddings(), block(*LAYER, pre_norms(), attention())))


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 131, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def drafts(root: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Of each model, an architecture of ours or a model_type: what its draft says is to do, and what fails of its checks."""
    return {name: _draft(Path(root) / name, name) for name in names}


def _draft(folder: Path, name: str) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_model.quiet()
    config = (
        tiny_model.tiny_config(all_families()[name], check_family.LAYERS)
        if name in all_families()
        else {"model_type": name, **SMALL}
    )
    made = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(made)
    model.save_pretrained(folder)
    if name in all_families():
        (folder / "config.json").write_text(json.dumps(config))
    shapes = {tensor: info.shape for tensor, info in find_tensors(folder).items()}
    text, todo = draft.draft(json.loads((folder / "config.json").read_text()), shapes, name)
    names: dict[str, Any] = {}
    exec(text, names)
    family = names["FAMILY"]
    known = all_families().get(family.architecture)
    register(family)
    try:
        found = [check_config.check_config(family, {**family.tiny, "model_type": family.model_type}, "tiny")]
        source = tiny_model.write_tiny_model(folder / "tiny", tiny_model.tiny_config(family, check_family.LAYERS), family)
        config_of_trial, layout = config_of(source, folder)
        found += check_family.check_tiny_model(config_of_trial, layout, source, folder / "export")
        problems = problems_of(found)
    except MegabridgeError as error:
        problems = [str(error)]
    finally:
        if known is not None:
            register(known)
    return {"todo": todo, "text": text, "problems": problems}
