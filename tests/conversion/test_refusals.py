"""Exports that fail, copies of tied weights, dtypes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from megabridge.parallel.topology import Topology
from tests.support.models import TINY, changed_model
from tests.support.payload import payload
from tests.support.rank_server import RankServer

Tensors = dict[str, torch.Tensor]


def test_a_tied_checkpoint_may_carry_its_head(ranks: RankServer, tmp_path: Path) -> None:
    """A bit-equal copy is accepted, and written back."""
    tied = {**TINY, "tie_word_embeddings": True}
    ranks.run("tests.support.models:write_model", kwargs={"folder": tmp_path / "tied", "config": tied})
    copy = changed_model(
        tmp_path / "tied", tmp_path / "copy", lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()})
    )
    for layout in (Topology(), Topology(tp=2, pp=2)):
        for source in (tmp_path / "tied", copy):
            out = tmp_path / f"out-{layout}-{source.name}"
            ranks.run("tests.support.convert:replaced", topology=layout, kwargs={"source": str(source), "out": str(out)})
            assert payload(out) == payload(source)
            assert not list(tmp_path.glob(".*"))


def test_a_rank_that_cannot_write_fails_all_and_publishes_nothing(ranks: RankServer, tmp_path: Path) -> None:
    ranks.run("tests.support.models:write_model", kwargs={"folder": tmp_path / "source", "config": TINY})
    kwargs = {"source": str(tmp_path / "source"), "out": str(tmp_path / "out"), "rank": 1}
    seen = ranks.run("tests.support.convert:failing_export", topology=Topology(tp=2), kwargs=kwargs)
    for kind, message, published in seen:
        assert kind == "CheckpointError" and "No space left on device" in message and not published
    assert "rank 1 failed while writing weights" in seen[0][1]


def test_dtypes(ranks: RankServer, tmp_path: Path) -> None:
    ranks.run("tests.support.models:write_model", kwargs={"folder": tmp_path / "source", "config": TINY})
    (seen, _) = ranks.run(
        "tests.support.convert:dtypes", topology=Topology(tp=2), kwargs={"source": str(tmp_path / "source"), "out": str(tmp_path)}
    )
    assert seen == {"params": {"torch.bfloat16"}, "mismatched": ()}
    source, bf16, fp32 = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "bf16", "fp32"))
    for name, tensor in source.items():
        assert torch.equal(bf16[name], tensor.bfloat16()) and bf16[name].dtype == torch.bfloat16
        assert torch.equal(fp32[name], tensor.bfloat16().float()) and fp32[name].dtype == torch.float32
    assert [json.loads((tmp_path / name / "config.json").read_text())["dtype"] for name in ("bf16", "fp32")] == [
        "bfloat16",
        "float32",
    ]
