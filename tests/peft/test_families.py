"""Adapters of every family, fused and transposed linears and experts: layouts agree, and exports say what the adapted model says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from megabridge.conformance import check_family
from megabridge.errors import ConfigError
from megabridge.families import all_families
from megabridge.mapping import Dims
from megabridge.parallel.topology import Topology
from megabridge.peft import LoRA
from megabridge.peft.rules import AdapterMap
from tests.support import models, tiny
from tests.support.covering import cover, further
from tests.support.families import MIXTURES
from tests.support.rank_server import RankServer

# One of each arrangement of linears: one tensor for several, transposed or not, one for each, in groups or not, gated or not.
KINDS = ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM", "GlmForCausalLM", "Gemma2ForCausalLM", "NemotronForCausalLM"]
# Experts that are one 3-D parameter of a layer: in turn and biased, which PEFT takes the other way round, of another name in files.
STACKED = ["GptOssForCausalLM", "Llama4ForCausalLM", "GraniteMoeForCausalLM"]
# transformers before 5.13 has other names for Granite's.
IN_PEFT = STACKED if Version(version("transformers")) >= Version("5.13") else STACKED[:2]
# One of each arrangement of experts: gated, shared beside routed with latent attention, and those.
SOME = ["DeepseekV2ForCausalLM", "MixtralForCausalLM", *STACKED]
DENSE = sorted({*KINDS, *cover(sorted(all_families().keys() - set(MIXTURES)), ["alone"])["alone"]})
BIASED = "GptOssForCausalLM"  # megatron-core has no expert tensor parallelism for experts with biases
CASES: dict[str, tuple[Topology, list[str], bool]] = {
    "dense-tp2": (Topology(tp=2), KINDS, False),
    "dora-tp2": (Topology(tp=2), ["GPT2LMHeadModel", "Phi3ForCausalLM"], True),
    "etp2ep2": (Topology(tp=2, ep=2, etp=2, dp=2), [name for name in SOME if name != BIASED], False),
    "tp2ep2": (Topology(tp=2, ep=2, etp=1), SOME, False),
    "dora-etp2ep2": (Topology(tp=2, ep=2, etp=2, dp=2), ["MixtralForCausalLM"], True),
    "pp2ep2": (Topology(pp=2, ep=2, dp=2), ["MixtralForCausalLM", "GptOssForCausalLM"], False),
}


@pytest.fixture(scope="module")
def sources(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("adapted")
    ranks.run("tests.support.families:make", kwargs={"root": str(root), "architectures": [*DENSE, *SOME]}, timeout=900)
    return root


@pytest.fixture(scope="module")
def alone(ranks: RankServer, sources: Path) -> dict[bool, dict[str, Any]]:
    """What one rank sees, without and with DoRA."""
    return {use_dora: seen(ranks, sources, Topology(), names, use_dora) for use_dora, names in (
        (False, [*DENSE, *SOME]), (True, sorted({name for _, names, use_dora in CASES.values() if use_dora for name in names})),
    )}  # fmt: skip


def seen(ranks: RankServer, sources: Path, topology: Topology, names: list[str], use_dora: bool) -> dict[str, Any]:
    out = sources / f"out-{topology}-{use_dora}"
    kwargs = {"root": str(sources), "out": str(out), "names": names, "use_dora": use_dora}
    found: dict[str, Any] = ranks.run("tests.support.peft:families", topology=topology, kwargs=kwargs, timeout=900)[0]
    wrong = [f"{name}: read again {each['again']}" for name, each in found.items() if each["again"] > 1e-4 * each["scale"]]
    wrong += [f"{name}: merged {each['merged']}" for name, each in found.items() if each["merged"] > 1e-4 * each["scale"]]
    wrong += [f"{name}: {each['losses']}" for name, each in found.items() if each["losses"][-1] > each["losses"][0] - 0.1]
    wrong += [f"{name}: a router is near a tie" for name, each in found.items() if not each["steady"]]
    assert not wrong, "\n".join(wrong)
    return found


@pytest.mark.cover
def test_alone(alone: dict[bool, dict[str, Any]]) -> None:
    names = {end.split(".lora_")[0].rpartition(".")[2] for each in alone[False].values() for end in each["tensors"]}
    assert names >= {
        "q_proj",
        "w1",
        "w2",
        "c_attn",
        "qkv_proj",
        "gate_up_proj",
        "query_key_value",
        "kv_a_proj_with_mqa",
        "down_proj",
    }
    for architecture in STACKED:
        ends = {name.partition("experts.")[2] for name in alone[False][architecture]["tensors"] if "experts." in name}
        assert ends == {f"{nested}lora_{side}.weight" for nested in ("", "base_layer.") for side in "AB"}
    experts = [name for name in alone[False]["MixtralForCausalLM"]["tensors"] if ".experts.7." in name]
    assert len(experts) == check_family.LAYERS * 3 * 2, "three linears of each layer, A and B"


@pytest.mark.parametrize(
    "case", ["dense-tp2", "tp2ep2", *further(*(case for case in CASES if case not in ("dense-tp2", "tp2ep2")))]
)
def test_layouts_agree(case: str, sources: Path, alone: dict[bool, dict[str, Any]], ranks: RankServer) -> None:
    topology, names, use_dora = CASES[case]
    found = seen(ranks, sources, topology, names, use_dora)
    for name in names:
        assert found[name]["tensors"] == alone[use_dora][name]["tensors"]
        assert found[name]["losses"] == pytest.approx(alone[use_dora][name]["losses"], abs=1e-4), name
        assert found[name]["norms"][0] == pytest.approx(alone[use_dora][name]["norms"][0], rel=1e-5), name


def test_peft_has_the_same_logits_and_merge_of_stacked_experts(sources: Path, alone: dict[bool, Any], ranks: RankServer) -> None:
    """Of what test_alone trained; the bounds are those of linears: fp32 logits, and weights of one sum."""
    kwargs = {"root": str(sources), "out": str(sources / f"out-{Topology()}-False"), "names": IN_PEFT}
    found = ranks.run("tests.support.peft_reference:stacked", kwargs=kwargs, timeout=900)[0]
    for name in IN_PEFT:
        assert torch.allclose(found[name]["logits"], alone[False][name]["logits"], atol=1e-4), name
        assert found[name]["far"] <= 1e-6, name


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_trains_stacked_experts_alike(name: str, sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    """From the first values that a run of no steps wrote, A and B where PEFT has them."""
    peft = {"name": "lora", "target_parameters": ["experts.*"]}
    given = {"source": str(sources / name), "peft": peft, "provider": {"moe_aux_loss_coeff": 0.0}}
    for steps in (0, 5):
        ours = ranks.run("tests.support.peft:train", kwargs={**given, "run_dir": str(tmp_path / str(steps)), "steps": steps})[0]
    kwargs = {"base": str(sources / name), "adapter": str(tmp_path / "0" / "adapter"), "steps": 5, "with_peft": True}
    losses = ranks.run("tests.support.peft_reference:train", kwargs=kwargs)[0]
    assert ours["losses"] == pytest.approx(losses, abs=1e-3)
    assert losses[-1] < losses[0] - 0.1


MODULES = {"GptOssForCausalLM": "mlp", "Llama4ForCausalLM": "feed_forward", "GraniteMoeForCausalLM": "block_sparse_moe"}
TARGETS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
    "first": {"target_modules": [], "target_parameters": ["gate_up_proj"]},
    "second": {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    "layer": {"target_modules": ["q_proj"], "target_parameters": ["layers.1.{}.experts.down_proj"]},
}


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *zip(IN_PEFT, TARGETS, strict=False),
        *further(*(pair for pair in product(IN_PEFT, TARGETS) if pair not in zip(IN_PEFT, TARGETS, strict=False))),
    ],
)
def test_adapters_of_stacked_experts_come_from_peft(
    name: str, targets: str, sources: Path, ranks: RankServer, tmp_path: Path
) -> None:
    tokens = models.prompt(tiny.VOCABULARY, length=tiny.SEQUENCE)
    parameters = [end.format(MODULES[name]) for end in TARGETS[targets]["target_parameters"]]
    kwargs = {"base": str(sources / name), "folder": str(tmp_path / "theirs"), "tokens": tokens, "r": 3, "lora_alpha": 5}
    kwargs |= {**TARGETS[targets], "target_parameters": parameters}
    expected = ranks.run("tests.support.peft_reference:begin", kwargs=kwargs)[0]
    for topology in (Topology(), Topology(tp=2, ep=2, etp=1)):
        out = tmp_path / str(topology)
        kwargs = {"source": str(sources / name), "adapter": str(tmp_path / "theirs"), "out": str(out)}
        logits = ranks.run("tests.support.peft:again", topology=topology, kwargs=kwargs)[0]
        assert torch.allclose(logits, expected, atol=1e-4)
        theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", out))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
        config = json.loads((out / "adapter_config.json").read_text())
        ends = [f"model.{end}" if targets == "layer" else end.split(".")[-1] for end in parameters]
        assert config["target_parameters"] == sorted(ends)


def test_what_is_refused_of_stacked_experts(sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    both = ("experts.gate_up_proj", "experts.down_proj")
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("GptOssForCausalLM", "lora", {"target_parameters": both, "use_dora": True}, "use_dora must be false"),
        ("GptOssForCausalLM", "lora", {"target_parameters": both, "lora_dropout": 0.1}, "lora_dropout=0.1 must be 0"),
        ("GptOssForCausalLM", "lora", {"target_modules": ("gate_up_proj",)}, "linear's name; name it in target_parameters"),
        ("GptOssForCausalLM", "lora", {"target_parameters": ("gate_up_proj_bias",)}, "(down_proj, gate_up_proj):"),
        ("MixtralForCausalLM", "new", {"path": str(tmp_path)}, "3-D parameter of a layer (this model has none)"),
    ]
    tokens = models.prompt(tiny.VOCABULARY, length=tiny.SEQUENCE)
    kwargs = {"base": str(sources / "MixtralForCausalLM"), "folder": str(tmp_path), "tokens": tokens}
    kwargs |= {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}  # transformers' model has such
    ranks.run("tests.support.peft_reference:begin", kwargs=kwargs)
    for name, kind, given, message in cases:
        (said,) = ranks.run("tests.support.peft:refusals", kwargs={"source": str(sources / name), "calls": [(kind, given)]})[0]
        assert said.startswith("ConfigError: ") and message in said, said
    silent = replace(all_families()["GptOssForCausalLM"], parameters=None)
    dims = Dims.of(silent.native(dict(silent.tiny)))
    with pytest.raises(ConfigError, match="must say how PEFT sees"):
        AdapterMap(silent, LoRA(target_parameters=both)).target("decoder.layers.0.mlp.experts.linear_fc2.weight", dims)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", *further("Llama4ForCausalLM")])
def test_experts_are_saved_and_resumed(name: str, sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    """Bit for bit under expert parallelism, and under another layout."""
    source, peft = str(sources / name), {"name": "lora", "target_parameters": ["experts.*"] if name in STACKED else []}

    def train(topology: Topology, folder: str, **kwargs: Any) -> dict[str, Any]:
        given = {"run_dir": str(tmp_path / folder), "source": source, "peft": peft, "steps": 4, **kwargs}
        result: dict[str, Any] = ranks.run("tests.support.peft:train", topology=topology, kwargs=given)[0]
        return result

    spread = Topology(ep=2, dp=2)
    whole = train(spread, "whole")
    train(spread, "halves", stop_after=2)
    shutil.copytree(tmp_path / "halves", tmp_path / "other")
    second = train(spread, "halves", resume="auto")
    other = train(Topology(tp=2, ep=2, etp=1), "other", resume="auto")
    assert second["losses"] == whole["losses"][2:]
    assert all(torch.equal(second["adapters"][name], tensor) for name, tensor in whole["adapters"].items())
    assert other["losses"] == pytest.approx(whole["losses"][2:], abs=1e-4)


def test_a_native_checkpoint_of_stacked_experts_alone(sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    """Which linears have none is kept too."""
    source, peft = str(sources / "GptOssForCausalLM"), {"name": "lora", "target_modules": [], "target_parameters": ["experts.*"]}
    kwargs = {"run_dir": str(tmp_path / "run"), "source": source, "peft": peft, "steps": 2, "save_at_end": True}
    trained = ranks.run("tests.support.peft:train", kwargs=kwargs)[0]
    kwargs = {"source": source, "native": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    logits = ranks.run("tests.support.peft:from_native", topology=Topology(pp=2), kwargs=kwargs)[0]
    assert torch.allclose(logits, trained["logits"], atol=1e-4)
    saved = tmp_path / "run" / "checkpoints" / "step_2" / "adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / "adapter" / name).read_bytes() == (saved / name).read_bytes()
