"""What the ranks of tests/peft run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.callbacks.hf_export import HFExport
from megabridge.config import schema
from megabridge.conformance import tiny_model
from megabridge.errors import MegabridgeError
from megabridge.models.logits import gather_logits
from megabridge.native import reader
from megabridge.parallel import collectives, process_groups
from megabridge.peft import LoRA
from megabridge.storage import folders
from megabridge.training import Trainer, build, build_optimizer
from megabridge.training.stopping import Stopped
from recipes import convert as convert_recipe
from tests.support import steady, tiny
from tests.support.convert import provide
from tests.support.models import llama_config, prompt, reference_logits, write_model
from tests.support.train import _forward_backward, batches
from tests.support.training import Interrupt

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizer
from megatron.core.optimizer import get_megatron_optimizer

SEQUENCE = tiny.SEQUENCE
SHAPE = {
    "vocab_size": tiny.VOCABULARY, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "hidden_size": 32, "intermediate_size": 48, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
}  # fmt: skip


BATCHES: dict[str, int] = {"MixtralForCausalLM": 1, "GptOssForCausalLM": 2, "GraniteMoeForCausalLM": 2}
"""By family, the first of the batches with which its routing is steady through all steps; else batch 0."""


def config(
    run_dir: str, source: str, *, steps: int, peft: dict[str, Any], provider: dict[str, Any] | None = None, **checkpoint: Any
) -> schema.Config:
    topology = process_groups.current()
    assert topology is not None
    sizes = {name: getattr(topology, name) for name in ("tp", "pp", "vpp", "ep", "etp", "dp")}
    return schema.typed(
        {
            "model": {"name": "tiny", "path": source, "dtype": "float32", "provider": provider or {}},
            "parallel": {**sizes, "sequence_parallel": topology.tp > 1 and (topology.pp > 1 or topology.ep > 1)},
            "recipe": {"steps": steps, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": SEQUENCE},
            "checkpoint": {"save_at_end": False, "hf": True, **checkpoint},
            "optimizer": {"lr": 5e-3, "clip_grad": 1.0, "weight_decay": 0.01, "eps": steady.EPSILON},
            "scheduler": {"name": "constant"},
            "peft": {"r": 4, "lora_alpha": 8, **peft},
            "run_dir": run_dir,
        }
    )


def trainer(given: schema.Config, callbacks: list[Any]) -> Trainer:
    bridge = build.bridge(given)
    provider = build.provider(given, bridge)
    chunks = provider.provide_distributed_model(init="empty")
    optimizer, scheduler = build_optimizer(chunks, given.optimizer, given.scheduler, steps=given.recipe.steps)
    data: Any = tiny.Samples(given.recipe.micro_batch_size)
    return Trainer(given, chunks=chunks, optimizer=optimizer, scheduler=scheduler, data=data, bridge=bridge, callbacks=callbacks)


def train(
    run_dir: str, source: str, *, steps: int, peft: dict[str, Any], stop_after: int | None = None, **checkpoint: Any
) -> dict[str, Any]:
    """Trains adapters; returns the losses, norms, and every adapter tensor by its PEFT name."""
    recorder = tiny.Recorder()
    callbacks: list[Any] = [recorder, HFExport(), *([] if stop_after is None else [Interrupt(stop_after)])]
    made = trainer(config(run_dir, source, steps=steps, peft=peft, **checkpoint), callbacks)
    assert made.bridge is not None
    with contextlib.suppress(Stopped), steady.watched() as routed:
        made.fit()
    logits = gather_logits(made.chunks, prompt(tiny.VOCABULARY, length=SEQUENCE))
    made.bridge.save_hf_adapter(made.chunks, Path(run_dir) / "adapter", show_progress=False)
    made.bridge.save_hf_pretrained(made.chunks, Path(run_dir) / "merged", show_progress=False)
    made.bridge.save_hf_pretrained(made.chunks, Path(run_dir) / "base", show_progress=False, merge_adapter_weights=False)
    return {
        "steady": all(routed),
        "losses": [step["train/loss"] for step in recorder.steps],
        "norms": [step["train/grad_norm"] for step in recorder.steps],
        "adapters": dict(made.bridge.export_adapter_weights(made.chunks, show_progress=False)),
        "logits": logits,
        "trained": sum(p.numel() for chunk in made.chunks for p in chunk.parameters() if p.requires_grad),
        "native": folders.latest(made.checkpoints),
    }


def make(folder: str, **changes: Any) -> None:
    """A tiny Llama in `folder` whose heads, KV heads and widths tp4 can cut; it has biases."""
    source = {**llama_config(3), **SHAPE, **changes}
    write_model(Path(folder), source, 3)


def stored_names(folder: str) -> list[str]:
    """The tensors of a native checkpoint, without the optimizer's."""
    return sorted(name for name in reader.open_folder(Path(folder)).tensors() if not name.startswith("optimizer."))


def again(source: str, adapter: str, out: str) -> torch.Tensor:
    """Logits of a model that is given the adapters of a PEFT folder; it writes them to `out` again."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, peft=adapter)
    bridge.save_hf_adapter(model, out, show_progress=False)
    return gather_logits(model, prompt(tiny.VOCABULARY, length=SEQUENCE))


def all_again(calls: list[dict[str, str]]) -> list[torch.Tensor]:
    """`again` with the arguments of each call."""
    return [again(**call) for call in calls]


def from_native(source: str, native: str, out: str) -> torch.Tensor:
    """Logits of a native checkpoint of adapters; PEFT folder and merged folder made from it in one call each."""
    bridge = AutoBridge.from_hf_pretrained(source)
    topology = process_groups.current()
    assert topology is not None
    sizes = {"tp": topology.tp, "pp": topology.pp}
    model = bridge.load_megatron_model(native, **sizes)
    bridge.export_adapter_ckpt(native, Path(out) / "adapter", show_progress=False, **sizes)
    bridge.export_ckpt(native, Path(out) / "merged", show_progress=False, **sizes)
    return gather_logits(model, prompt(tiny.VOCABULARY, length=SEQUENCE))


def refusals(source: str, calls: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What adapting the model says, by the arguments of LoRA, or of a folder's import into adapters of r=4."""
    out = []
    for what, given in calls:
        bridge = AutoBridge.from_hf_pretrained(source)
        try:
            if what == "lora":
                provide(bridge, load_weights=False, peft=LoRA(**given))
            elif what == "new":
                provide(bridge, load_weights=False, peft=given["path"])
            else:
                bridge.load_hf_adapter(provide(bridge, load_weights=False, peft=LoRA(r=4, lora_alpha=8)), given["path"])
            out.append("nothing was raised")
        except MegabridgeError as error:
            out.append(f"{type(error).__name__}: {error}")
    return out


def families(root: str, out: str, names: list[str], *, use_dora: bool = False) -> dict[str, dict[str, Any]]:
    """Of each family's tiny model: losses of three steps of its adapters, and how far the merged export and the PEFT folder, read
    again, are from the adapted model's logits."""
    topology = process_groups.current()
    assert topology is not None
    return {name: _family(Path(root) / name, Path(out) / name, topology.tp > 1, use_dora) for name in names}


def _family(source: Path, out: Path, sequence_parallel: bool, use_dora: bool) -> dict[str, Any]:
    bridge = AutoBridge.from_hf_pretrained(source)
    parameters = () if bridge.source.family.parameters is None else ("experts.gate_up_proj", "experts.down_proj")
    lora = LoRA(r=3, lora_alpha=6, use_dora=use_dora, target_parameters=parameters)
    settings: dict[str, Any] = {"sequence_parallel": sequence_parallel}
    model = provide(bridge, wrap_with_ddp=True, peft=lora, **settings)
    adam = MegatronOptimizer(optimizer="adam", lr=3e-2, adam_eps=steady.EPSILON, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(adam, model)
    losses, norms = [], []
    batch = batches(BATCHES.get(source.name, 0), bridge.source.config["vocab_size"])
    tokens = tiny_model.read_reference(source).prompt
    with steady.watched() as routed:
        for _ in range(3):
            for chunk in model:
                chunk.zero_grad_buffer()
            losses.append(_forward_backward(model, batch))
            norms.append(float(optimizer.step()[1]))
        logits = gather_logits(model, tokens)
    bridge.save_hf_adapter(model, out / "adapter", show_progress=False)
    bridge.save_hf_pretrained(model, out / "merged", show_progress=False)
    again = provide(AutoBridge.from_hf_pretrained(source), peft=out / "adapter", **settings)
    return {
        "steady": all(routed),
        "losses": losses,
        "norms": norms,
        "again": float((gather_logits(again, tokens) - logits).abs().max()),
        "merged": float((reference_logits(out / "merged", tokens) - logits).abs().max()) if collectives.rank() == 0 else 0.0,
        "scale": float(logits.abs().max()),
        "logits": logits,
        "tensors": sorted(bridge.adapter_plan(model).tensors),
    }


def convert(run_dir: str, source: str, native: str, peft: dict[str, Any]) -> None:
    """recipe=convert conversion.mode=export of a native checkpoint of adapters."""
    given = config(run_dir, source, steps=0, peft=peft, resume=native)
    given.conversion.mode = "export"
    convert_recipe.main(given)
