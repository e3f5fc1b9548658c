"""Makes what tests/fixtures keeps of a format: python -m tests.support.fixtures tests/fixtures/format_1

A run of two steps with all parameters (`run`: its directory, with a native checkpoint and an export) and one of adapters alone
(`adapter`). Later versions read what this one wrote: make a new folder where a format changes, and keep the old one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.support.command import ROOT
from tests.support.rank_server import RankServer

SHAPE = "hidden_size=16,intermediate_size=24,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2,head_dim=4"
COMMON = [
    "model=tiny_llama", *(f"model.hf.{pair}" for pair in SHAPE.split(",")), "recipe=pretrain", "data=random_tokens", "recipe.seq_length=16",
    "recipe.global_batch_size=2", "recipe.micro_batch_size=1", "recipe.log_every=1", "recipe.eval_every=null", "logger=local",
    "parallel=tp2", "platform=cpu", "seed=1",
]  # fmt: skip


def main(target: Path) -> None:
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder, RankServer(Path(folder), root=ROOT) as ranks:
        for name, more in (("run", []), ("adapter", ["peft=lora", "peft.r=2"])):
            done = ranks.program([*COMMON, *more, "recipe.steps=2", f"run_dir={folder}/{name}"], cwd=Path(folder))
            assert done.returncode == 0, done.stdout + done.stderr
        shutil.copytree(Path(folder, "run"), target / "run", ignore=shutil.ignore_patterns(".hydra", "wandb", "*.log", ".*.lock"))
        shutil.copytree(Path(folder, "adapter", "checkpoints", "step_2", "adapter"), target / "adapter")


def export(native: str, out: str) -> tuple[str, ...]:
    """Exports a native checkpoint with what it carries; the tensors that differ."""
    from megabridge import AutoBridge

    return AutoBridge.from_auto_config(native).export_ckpt(native, out, show_progress=False).mismatched


def adapt(base: str, adapter: str, out: str) -> tuple[str, ...]:
    """Loads an adapter onto its base and publishes it again; the tensors that differ."""
    from megabridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(base)
    return bridge.save_hf_adapter(bridge.to_megatron_model(peft=adapter), out, show_progress=False).mismatched


if __name__ == "__main__":
    main(Path(sys.argv[1]))
