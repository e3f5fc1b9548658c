"""A run is resumed over the weights, the data and the tokenizer that it began with, or says that it is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankError, RankServer
from tests.support.recipe_runs import run, values

CASES = "tests.support.recipes"


def replaced(file: Path, old: bytes, new: bytes) -> None:
    """Writes over a part of a file, which keeps its size and its times."""
    content, stamp = file.read_bytes(), file.stat()
    assert old in content and len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_a_run_goes_on_over_what_it_began_with(ranks: RankServer, tmp_path: Path) -> None:
    model, rows, topology = tmp_path / "model", tmp_path / "rows.jsonl", Topology(dp=2)
    ranks.run(f"{CASES}:make_source", kwargs={"folder": str(model), "tokenizer": True})
    rows.write_text("".join(json.dumps({"text": letter * 8}) + "\n" for letter in "ABCDEFGHIJKLMNOP"))

    def config(**groups: Any) -> dict[str, Any]:
        made = values(tmp_path / "run", model, topology, **groups)
        made["data"] = {"_target_": "megabridge.data.finetuning.Finetuning", "path": str(rows)}
        made["callbacks"] = {}
        return made | {"peft": {"name": "lora"}}

    run(ranks, "finetune", topology, config(recipe={"steps": 1}))
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    middle = len(content) // 2  # of the embedding's or a linear's rows: those of norms are all the same
    cases: dict[str, tuple[Path, bytes, bytes]] = {
        "inputs.weights": (weights, content[middle : middle + 64], content[middle + 4 : middle + 68]),
        "inputs.rows": (rows, b"MMMM", b"MMMA"),
        "inputs.tokenizer": (model / "tokenizer.json", b'"WordLevel"', b'"WordLevel"'),
        "inputs.config.layernorm_epsilon": (model / "config.json", b"1e-05", b"2e-05"),
    }
    again = config(recipe={"steps": 2}, checkpoint={"resume": "auto"})
    for name, (file, old, new) in cases.items():
        before, stamp = file.read_bytes(), file.stat()
        if name == "inputs.tokenizer":
            file.write_bytes(before + b"\n")
        else:
            replaced(file, old, new)
        with pytest.raises(RankError, match=rf"(?s)put these back, or name them in.*\n  {name}: .* -> .*recipe\.steps: 1 -> 2"):
            run(ranks, "finetune", topology, again)
        file.write_bytes(before)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    model.rename(tmp_path / "moved")  # equal weights are the same weights, wherever they are
    model = tmp_path / "moved"
    run(ranks, "finetune", topology, config(recipe={"steps": 2}, checkpoint={"resume": "auto"}))
    said = (tmp_path / "run/lines.txt").read_text()
    assert f"model.path: {tmp_path / 'model'} -> {model}" in said and "inputs." not in said

    shutil.rmtree(tmp_path / "run")
    (tmp_path / "kept").rename(tmp_path / "run")
    replaced(model / "model.safetensors", *cases["inputs.weights"][1:])
    accepted = {"resume": "auto", "accept_changes": ["inputs.weights"]}
    run(ranks, "finetune", topology, config(recipe={"steps": 2}, checkpoint=accepted))
    assert "inputs.weights: " in (tmp_path / "run/lines.txt").read_text()
