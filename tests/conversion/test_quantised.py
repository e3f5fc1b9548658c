"""Quantised sources: what ranks import is what the numbers stand for, bit for bit, and they read what they own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.families.gpt_oss import FAMILY as GPT_OSS
from megabridge.parallel.topology import Topology
from tests.support.covering import further
from tests.support.models import changed_model
from tests.support.payload import payload
from tests.support.quantised_models import CASES, DEEPSEEK, MIXTURE, SHAPE
from tests.support.rank_server import RankServer

Q = "model.layers.0.self_attn.q_proj.weight"
SCALES = Q + "_scale_inv"


def make(ranks: RankServer, root: Path, config: dict[str, Any], block: tuple[int, int]) -> Path:
    """Folders `source`, `fp8` and `plain` (see `write_fp8`)."""
    ranks.run("tests.support.models:write_model", kwargs={"folder": root / "source", "config": config})
    ranks.run(f"{CASES}:write_fp8", kwargs={"source": str(root / "source"), "block": block})
    return root


@pytest.fixture(scope="module")
def dense(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(ranks, tmp_path_factory.mktemp("dense"), SHAPE, (128, 128))


def check_import(ranks: RankServer, root: Path, layout: Topology, out: Path, slack: float) -> None:
    given = {"fp8": str(root / "fp8"), "plain": str(root / "plain"), "out": str(out)}
    seen = ranks.run(f"{CASES}:imports", topology=layout, kwargs=given)
    size = sum(len(data) for _, _, data in payload(root / "plain").values())
    for rank, ways in enumerate(seen):
        for way in ways:
            assert way["equal"] and way["quantised"] and way["report"] == (size, True, ())
            copied = way["copied"][rank]
            assert way["stored"] < copied <= slack * way["stored"], (
                "the packed numbers that it owns, and the scales of their blocks"
            )
    assert payload(out) == payload(root / "plain")
    config = json.loads((root / "source" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config, "nothing but quantization_config is gone"


@pytest.mark.parametrize("layout", [Topology(tp=2, pp=2), *further(Topology(), Topology(tp=3), Topology(tp=2, dp=2))], ids=str)
def test_block_fp8_is_imported_as_what_it_stands_for(ranks: RankServer, dense: Path, layout: Topology, tmp_path: Path) -> None:
    check_import(ranks, dense, layout, tmp_path / "out", slack=1.01)


def test_experts_in_block_fp8(ranks: RankServer, tmp_path: Path) -> None:
    make(ranks, tmp_path, MIXTURE, (16, 20))
    for number, layout in enumerate((Topology(ep=2, dp=2), Topology(tp=2, ep=2, etp=1), Topology(tp=2, dp=2, ep=2, etp=2))):
        check_import(ranks, tmp_path, layout, tmp_path / f"out{number}", slack=1.05)


def test_gpt_oss_in_mxfp4(ranks: RankServer, tmp_path: Path) -> None:
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **GPT_OSS.tiny,
        "intermediate_size": 96,
        "dtype": "bfloat16",
    }
    ranks.run("tests.support.models:write_model", kwargs={"folder": tmp_path / "source", "config": config})
    ranks.run(f"{CASES}:write_mxfp4", kwargs={"source": str(tmp_path / "source")})
    for number, layout in enumerate((Topology(), Topology(pp=2, ep=2, dp=2), Topology(tp=2, ep=2, etp=1), Topology(ep=4, dp=4))):
        check_import(ranks, tmp_path, layout, tmp_path / f"out{number}", slack=1.07)


@pytest.mark.parametrize("layout", [Topology(pp=2, ep=2, dp=2), *further(Topology())], ids=str)
def test_deepseek_with_layers_that_are_carried(ranks: RankServer, tmp_path: Path, layout: Topology) -> None:
    """Those of multi-token prediction are quantised too: decoded for an export, and for a native checkpoint."""
    ranks.run("tests.support.mtp:make", kwargs={"folder": str(tmp_path / "source"), "architecture": DEEPSEEK})
    ranks.run(f"{CASES}:write_fp8", kwargs={"source": str(tmp_path / "source"), "block": (12, 20)})
    given = {"source": str(tmp_path / "fp8"), "out": str(tmp_path / "out")}
    assert not any(ranks.run("tests.support.mtp:not_built", topology=layout, kwargs=given))
    for name in ("straight", "after"):
        assert payload(tmp_path / "out" / name) == payload(tmp_path / "plain")
    assert not list(tmp_path.glob("**/.parameters-*"))


def test_transformers_dequantises_to_the_same_bits(ranks: RankServer, tmp_path: Path) -> None:
    config = {**SHAPE, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}
    make(ranks, tmp_path, config, (128, 128))
    given = {"fp8": str(tmp_path / "fp8"), "plain": str(tmp_path / "plain")}
    assert ranks.run(f"{CASES}:by_transformers", kwargs=given) == [[]]
    check_import(ranks, tmp_path, Topology(tp=2), tmp_path / "out", slack=1.01)


def test_memory_does_not_grow_with_a_tensor(ranks: RankServer, tmp_path: Path) -> None:
    """As float32 the largest tensor alone has the 64 MiB that an import may take."""
    config = {
        **SHAPE,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "head_dim": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 1,
    }
    make(ranks, tmp_path, config, (128, 128))
    for seen in ranks.run(f"{CASES}:memory", kwargs={"fp8": str(tmp_path / "fp8")}, topology=Topology())[0]:
        assert seen["import"] - seen["before"] < 64 << 20


def test_what_does_not_fit_is_refused_by_name(ranks: RankServer, dense: Path, tmp_path: Path) -> None:
    def nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors[SCALES][0, 0] = torch.nan

    said = json.loads((dense / "fp8" / "config.json").read_text())["quantization_config"]
    changes: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
        "missing": (lambda t: t.pop(SCALES), {}, ["CheckpointError", f"{Q} is float8_e4m3fn and lacks its scales"]),
        "alone": (lambda t: t.update({Q: t[Q].bfloat16()}), {}, ["CheckpointError", f"{SCALES} has no {Q} in float8_e4m3fn"]),
        "shape": (lambda t: t.update({SCALES: torch.ones(1, 2)}), {}, ["CheckpointError", f"{SCALES} must be", "(2, 2), not", "(1, 2)"]),
        "dtype": (lambda t: t.update({SCALES: torch.ones(2, 2).int()}), {}, ["CheckpointError", "not torch.int32"]),
        "NaN": (nan, {}, ["CheckpointError", "NaN", Q]),
        "unsaid": (None, {"quantization_config": None}, ["CheckpointError", f"{Q} is quantised, but config.json has no"]),
        "block": (None, {"quantization_config": {**said, "weight_block_size": [128, 64]}}, ["CheckpointError", "(2, 3)"]),
        "method": (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["ConfigError", "'gptq'", "unquantised"]),
        "tensor": (None, {"quantization_config": {**said, "weight_block_size": None}}, ["ConfigError", "weight_block_size=None"]),
        "unknown": (None, {"quantization_config": {**said, "zero_point": 1}}, ["ConfigError", "zero_point=1"]),
        "fp4": (None, {"quantization_config": {**said, "expert_dtype": "fp4"}}, ["ConfigError", "expert_dtype='fp4'"]),
    }  # fmt: skip
    folders = [changed_model(dense / "fp8", tmp_path / name, change, **config) for name, (change, config, _) in changes.items()]
    given = {"folders": [str(folder) for folder in folders]}
    for rank in ranks.run(f"{CASES}:refusals", topology=Topology(tp=2), kwargs=given):
        for (name, (_, _, expected)), (kind, message, _) in zip(changes.items(), rank, strict=True):
            assert all(word in f"{kind}: {message}" for word in expected), (name, kind, message)


def test_a_native_checkpoint_keeps_what_the_source_was(ranks: RankServer, dense: Path, tmp_path: Path) -> None:
    """Its config says that the source was quantised; what is exported from it says no more."""
    given = {"fp8": str(dense / "fp8"), "native": str(tmp_path / "native"), "out": str(tmp_path / "out")}
    ranks.run(f"{CASES}:by_way_of_native", kwargs=given)
    assert payload(tmp_path / "out") == payload(dense / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert list((tmp_path / "native").glob("**/config.json"))
