"""Exports to block FP8: the same files from every layout and writer, as transformers quantises, compared before they appear."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabridge.families.gpt_oss import FAMILY as GPT_OSS
from megabridge.parallel.topology import Topology
from tests.support.models import changed_model
from tests.support.payload import payload
from tests.support.quantised import FP8, dequantised
from tests.support.quantised_models import CASES, DEEPSEEK, MIXTURE, SHAPE
from tests.support.rank_server import RankServer

LAYOUTS = [Topology(), Topology(tp=2), Topology(tp=3), Topology(tp=2, pp=2), Topology(pp=2, dp=2)]
E4M3 = "torch.float8_e4m3fn"
GOOD = (True, (), [], [])
EVEN: dict[str, Any] = {**SHAPE, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}


def write(ranks: RankServer, folder: Path, config: dict[str, Any]) -> Path:
    ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": config})
    return folder


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(ranks, tmp_path_factory.mktemp("models") / "source", SHAPE)


def publish(ranks: RankServer, source: Path, layout: Topology, outs: dict[Path, dict[str, Any]]) -> None:
    given = {"source": str(source), "outs": {str(out): settings for out, settings in outs.items()}}
    for rank in ranks.run(f"{CASES}:exports", topology=layout, kwargs=given):
        assert rank == [GOOD] * len(outs)


def test_every_layout_and_writer_makes_the_same_files(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    """Blocks of 128 x 128 lie across ranks: shares are of 96 and 64 columns, 56 and 84 rows, and heads of 32 rows."""
    for number, layout in enumerate(LAYOUTS):
        settings = {"max_shard_size": "100KB"}
        outs = {tmp_path / f"{number}-shared": settings, tmp_path / f"{number}-gather": {**settings, "writer": "gather"}}
        publish(ranks, source, layout, outs)
    first, *others = sorted(tmp_path.iterdir())
    names = [path.name for path in first.iterdir() if path.name != "megabridge.json"]  # that says the layout too
    assert len(names) > 4 and len(others) == 2 * len(LAYOUTS) - 1
    for other in others:
        assert filecmp.cmpfiles(first, other, names, shallow=False)[0] == names


def test_what_it_holds(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    publish(ranks, source, Topology(tp=2), {tmp_path / "out": {}})
    tensors, plain = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    linears = {name for name in plain if name.endswith("_proj.weight")}
    assert len(linears) == 14 and tensors.keys() == plain.keys() | {f"{name}_scale_inv" for name in linears}
    for name, tensor in plain.items():
        if name not in linears:
            assert torch.equal(tensors[name], tensor)
            continue
        packed, scales = tensors[name], tensors[f"{name}_scale_inv"]
        assert (packed.dtype, packed.shape, scales.dtype) == (torch.float8_e4m3fn, tensor.shape, torch.float32)
        assert list(scales.shape) == [-(-length // 128) for length in tensor.shape]
        assert packed[:128, :128].float().abs().max() == 448, "the range is used"
        error = (dequantised(packed, scales).float() - tensor.float()).abs()
        assert (error <= tensor.float().abs() / 16 + scales.max() / 512).all(), "half of a step of e4m3"
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said.pop("quantization_config") == {**FP8, "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    assert said == json.loads((source / "config.json").read_text())
    entries = json.loads((tmp_path / "out" / "megabridge.json").read_text())["tensors"]
    assert {entries[name]["dtype"] for name in linears} == {"F8_E4M3"} and entries.keys() == tensors.keys()


def test_it_is_what_transformers_quantises_and_reads(ranks: RankServer, tmp_path: Path) -> None:
    source = write(ranks, tmp_path / "source", EVEN)
    for ue8m0 in (False, True):
        given = source
        if ue8m0:  # a source that says so
            given = changed_model(source, tmp_path / "said", quantization_config={**FP8, "scale_fmt": "ue8m0"})
        out, back = tmp_path / f"fp8-{ue8m0}", tmp_path / f"back-{ue8m0}"
        publish(ranks, given, Topology(tp=2), {out: {}})
        kwargs = {"fp8": str(out), "plain": str(source), "ue8m0": ue8m0}
        assert ranks.run(f"{CASES}:as_transformers_quantises", kwargs=kwargs) == [[]]
        ranks.run(
            f"{CASES}:by_way_of_native", kwargs={"fp8": str(out), "native": str(tmp_path / f"native-{ue8m0}"), "out": str(back)}
        )
        assert ranks.run(f"{CASES}:by_transformers", kwargs={"fp8": str(out), "plain": str(back)}) == [[]]
        if ue8m0:  # powers of two are exact in bfloat16, so that what was quantised once loses nothing more
            publish(ranks, out, Topology(tp=2, pp=2), {tmp_path / "again": {}})
            assert ranks.run(f"{CASES}:by_transformers", kwargs={"fp8": str(tmp_path / "again"), "plain": str(back)}) == [[]]
            assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads((out / "config.json").read_text())


def test_experts_and_carried_layers(ranks: RankServer, tmp_path: Path) -> None:
    mixtral = write(ranks, tmp_path / "mixtral", MIXTURE)
    for number, layout in enumerate((Topology(), Topology(tp=2, dp=2, ep=2, etp=2))):
        publish(ranks, mixtral, layout, {tmp_path / f"{number}-shared": {}, tmp_path / f"{number}-gather": {"writer": "gather"}})
    first = payload(tmp_path / "0-shared")
    assert all(payload(folder) == first for folder in tmp_path.glob("?-*"))
    assert first["model.layers.0.block_sparse_moe.experts.7.w2.weight"][0] == E4M3
    assert first["model.layers.0.block_sparse_moe.gate.weight"][0] == "torch.bfloat16"
    said = json.loads((tmp_path / "0-shared" / "config.json").read_text())["quantization_config"]
    assert "model.layers.3.block_sparse_moe.gate" in said["modules_to_not_convert"]

    deepseek = tmp_path / "deepseek"
    ranks.run("tests.support.mtp:make", kwargs={"folder": str(deepseek), "architecture": DEEPSEEK})
    outs = {
        tmp_path / "mtp-shared": {"weight_dtype": "bfloat16"},
        tmp_path / "mtp-gather": {"weight_dtype": "bfloat16", "writer": "gather"},
    }
    publish(ranks, deepseek, Topology(pp=2, ep=2, dp=2), outs)
    shared = payload(tmp_path / "mtp-shared")
    assert payload(tmp_path / "mtp-gather") == shared
    layer = max(int(name.split(".")[2]) for name in shared if ".layers." in name)
    assert shared[f"model.layers.{layer}.mlp.experts.0.up_proj.weight"][0] == E4M3, "a layer of multi-token prediction"
    assert shared[f"model.layers.{layer}.eh_proj.weight"][0] == "torch.bfloat16"


def test_modules_that_the_source_excludes_stay(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    said = {**FP8, "modules_to_not_convert": ["lm_head", "o_proj", "model.layers.1"]}
    given = changed_model(source, tmp_path / "said", quantization_config=said)
    publish(ranks, given, Topology(), {tmp_path / "out": {}})
    quantised = [name for name, (dtype, _, _) in payload(tmp_path / "out").items() if dtype == E4M3]
    names = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert sorted(quantised) == [f"model.layers.0.{name}.weight" for name in names]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == said


def test_what_cannot_be_quantised_is_refused(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", **GPT_OSS.tiny, "dtype": "bfloat16"}
    gpt_oss = write(ranks, tmp_path / "gpt_oss", config)
    given: list[tuple[Path, dict[str, Any], list[str]]] = [
        (gpt_oss, {"quantization": "fp8_block"}, ["ConfigError", "mlp.experts.down_proj (8, 48, 64)", "export in bfloat16"]),
        (source, {"quantization": "int4"}, ["ConfigError", "quantization='int4' must be one of fp8_block"]),
        (source, {"quantization": "fp8_block", "nan": True}, ["ParityError", "NaN"]),
        (source, {"quantization": "fp8_block", "nan": True, "writer": "gather"}, ["ParityError", "NaN"]),
    ]
    kwargs = {"given": [(str(folder), settings) for folder, settings, _ in given], "out": str(tmp_path / "out")}
    for rank in ranks.run(f"{CASES}:export_refusals", topology=Topology(pp=2), kwargs=kwargs):
        for (_, _, expected), (kind, message) in zip(given, rank, strict=True):
            assert all(word in f"{kind}: {message}" for word in expected), (kind, message)


@pytest.mark.parametrize("writer", ["shared", "gather"])
def test_a_lost_bit_is_found_before_it_is_published(ranks: RankServer, source: Path, writer: str, tmp_path: Path) -> None:
    names = ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"]
    given = {"source": str(source), "out": str(tmp_path / "out"), "tensors": names, "writer": writer}
    for rank in ranks.run(f"{CASES}:damaged_exports", topology=Topology(tp=2), kwargs=given):
        for name, (kind, message) in zip(names, rank, strict=True):
            assert kind == "ParityError" and message.endswith(name)
    assert not (tmp_path / "out").exists()
