"""What a run publishes has the dtypes of its source; what was rounded for that is said, and compared as it was rounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer
from tests.support.recipe_runs import metrics, run, values

NORM = "model.norm.weight"


def trained(ranks: RankServer, folder: Path, source: Path, **more: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a run's last export, and what the run said of it."""
    topology = Topology(tp=2)
    config = values(folder, source, topology, recipe={"steps": 2}, **more)
    del config["callbacks"]["answer"]
    run(ranks, "finetune", topology, config)
    said = [line for line in (folder / "lines.txt").read_text().splitlines() if line.startswith("export of step 2")]
    assert len(said) == 1, "it is said once"
    return load_file(folder / "checkpoints/step_2/hf/model.safetensors"), said[0]


def test_exports_have_their_sources_dtypes_and_say_what_they_rounded(ranks: RankServer, tmp_path: Path, tiny_source: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    tensors[NORM] = tensors[NORM].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))

    found, said = trained(ranks, tmp_path / "run", source)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in tensors.items()}
    assert f"0 mismatched; {len(tensors) - 1} cast from float32 to bfloat16" in said
    assert json.loads((tmp_path / "run/checkpoints/step_2/hf/config.json").read_text()) == config
    (export,) = metrics(tmp_path / "run", "export/")
    assert export["export/cast_tensors"] == len(tensors) - 1 and export["export/mismatched_tensors"] == 0
    for row in metrics(tmp_path / "run", "parity/"):
        assert 0 <= row["parity/logits_kl"] < 1e-6 and row["parity/logits_max_abs_diff"] < 1e-4
    assert "; logits equal transformers' to " in said

    asked, said = trained(ranks, tmp_path / "asked", source, conversion={"export_dtype": "float32"}, checkpoint={"save_every": 1})
    assert {tensor.dtype for tensor in asked.values()} == {torch.float32} and " cast from " not in said
    assert all(torch.equal(asked[name].to(tensor.dtype), tensor) for name, tensor in found.items()), "the run itself is not rounded"
