"""From text to a trained model: recipe=prepare_data, show_data, and runs on what they make."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megabridge.config import schema
from megabridge.hf.random_models import write_random_model
from megabridge.parallel.topology import Topology
from megabridge.storage import metrics_file
from recipes import show_data
from tests.support.rank_server import RankServer

CASES = "tests.support.recipes"
SINGLE = Topology()
HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


def values(run_dir: Path, source: Path, topology: Topology = SINGLE, **groups: Any) -> dict[str, Any]:
    recipe = {"steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "seq_length": 64, **groups.pop("recipe", {})}
    return {
        "model": {"name": "tiny", "path": str(source)},
        "parallel": {"tp": topology.tp, "pp": topology.pp},
        "recipe": recipe,
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"save_at_end": False},
        "logger": {
            "jsonl": {"_target_": "megabridge.loggers.jsonl.JsonLines"},
            "lines": {"_target_": "tests.support.loggers.Lines"},
        },
        "run_dir": str(run_dir),
        **groups,
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("hf") / "tiny", HF)


@pytest.fixture(scope="module")
def files(ranks: RankServer, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.jsonl, corpus.bin and .idx that recipe=prepare_data made of it, and chats.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"text": f"Line {number} of the corpus, " * (1 + number % 5)} for number in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes" * (n % 6 + 1)}] for n in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats) + "{}\n")
    prepare = {"paths": [str(folder / "corpus.jsonl")], "output": str(folder / "corpus"), "workers": 2}
    ranks.run(f"{CASES}:recipe", kwargs={"name": "prepare_data", "values": values(folder / "run", source, prepare=prepare)})
    said = (folder / "run" / "lines.txt").read_text()
    assert f"60 documents, {(folder / 'corpus.bin').stat().st_size // 2} tokens: {folder / 'corpus'}.bin and .idx" in said
    return folder


DATA: dict[str, dict[str, Any]] = {
    "indexed": {"_target_": "megabridge.data.pretraining.IndexedTokens", "paths": ["corpus"], "split": [0.9, 0.1]},
    "separate": {
        "_target_": "megabridge.data.pretraining.IndexedTokens",
        "paths": ["corpus"],
        "split": [0.9, 0.1],
        "separate_documents": True,
    },
    "streamed": {"_target_": "megabridge.data.streaming.StreamedText", "path": "corpus.jsonl", "validation_documents": 9},
    "packed": {"_target_": "megabridge.data.finetuning.Finetuning", "path": "chats.jsonl", "packing": True, "max_bad_share": 0.1},
    "grouped": {
        "_target_": "megabridge.data.finetuning.Finetuning",
        "path": "chats.jsonl",
        "group_by_length": True,
        "pad_to": 12,
        "max_bad_share": 0.1,
    },
}


def placed(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with paths in `folder`."""
    if "paths" in data:
        return {**data, "paths": [str(folder / path) for path in data["paths"]]}
    return {**data, "path": str(folder / data["path"])}


@pytest.mark.parametrize("kind", DATA)
def test_runs_learn_the_same_under_every_layout(ranks: RankServer, source: Path, files: Path, tmp_path: Path, kind: str) -> None:
    curves = []
    for topology in (Topology(), Topology(tp=3, pp=3), Topology(dp=2)):
        run_dir = tmp_path / str(topology)
        config = values(run_dir, source, topology, data=placed(DATA[kind], files))
        final = ranks.run(f"{CASES}:recipe", topology=topology, kwargs={"name": "finetune", "values": config}, timeout=300)[0]
        steps = [record["train/loss"] for record in metrics_file.read(run_dir) if "train/loss" in record]
        assert len(steps) == 3 and final < steps[0]
        curves.append([*steps, final])
        if kind in ("packed", "grouped"):
            assert "1 of 41 rows left out (1 missing field)" in (run_dir / "lines.txt").read_text()
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[2] == pytest.approx(curves[0], abs=1e-4)


def test_show_data_marks_what_is_learned(source: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = values(tmp_path, source, data=placed(DATA["packed"], files), recipe={"options": {"samples": 2}})
    show_data.main(schema.typed(config))
    shown = capsys.readouterr().out
    said = (tmp_path / "lines.txt").read_text()
    assert "packed rows; 1 of 41 rows left out" in said and "row 1: " in said and "row 2: " not in said
    marked = re.findall(r"\[\[(.*?)\]\]", shown, re.DOTALL)
    assert marked and all(re.fullmatch(r"(yes)+<\|im_end\|>", text) for text in marked)
    assert shown.count("<|im_start|>assistant\n[[") == len(marked) > 2
    assert sum(map(int, re.findall(r"tokens, (\d+) learned", said))) == sum(len(text) - len("<|im_end|>") + 1 for text in marked)
