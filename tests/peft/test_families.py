"""Adapters of every family, fused and transposed linears and experts: layouts agree, and exports say what the adapted model says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.families import all_families
from megabridge.topology import Topology
from megabridge.workbench import battery
from tests.cases.families import MIXTURES
from tests.ranks import RankServer

DENSE = sorted(all_families().keys() - set(MIXTURES))
# One of each arrangement of linears: one tensor for several, transposed or not, one for each, in groups or not, gated or not.
KINDS = ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM", "GlmForCausalLM", "Gemma2ForCausalLM", "NemotronForCausalLM"]
# One of each arrangement of experts: gated, shared beside routed with latent attention, biased 3-D ones (which have no adapters).
SOME = ["DeepseekV2ForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"]
BIASED = "GptOssForCausalLM"  # megatron-core has no expert tensor parallelism for experts with biases
CASES: dict[str, tuple[Topology, list[str], bool]] = {
    "dense-tp2": (Topology(tp=2), KINDS, False),
    "dora-tp2": (Topology(tp=2), ["GPT2LMHeadModel", "Phi3ForCausalLM"], True),
    "etp2ep2": (Topology(tp=2, ep=2, etp=2, dp=2), [name for name in SOME if name != BIASED], False),
    "tp2ep2": (Topology(tp=2, ep=2, etp=1), SOME, False),
    "dora-etp2ep2": (Topology(tp=2, ep=2, etp=2, dp=2), ["MixtralForCausalLM"], True),
    "pp2ep2": (Topology(pp=2, ep=2, dp=2), ["MixtralForCausalLM"], False),
}


@pytest.fixture(scope="module")
def sources(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("adapted")
    ranks.run("tests.cases.families:make", kwargs={"root": str(root), "architectures": [*DENSE, *SOME]}, timeout=900)
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
    found: dict[str, Any] = ranks.run("tests.cases.peft:families", topology=topology, kwargs=kwargs, timeout=900)[0]
    wrong = [f"{name}: read again {each['again']}" for name, each in found.items() if each["again"] > 1e-4 * each["scale"]]
    wrong += [f"{name}: merged {each['merged']}" for name, each in found.items() if each["merged"] > 1e-4 * each["scale"]]
    wrong += [f"{name}: {each['losses']}" for name, each in found.items() if each["losses"][-1] > each["losses"][0] - 0.1]
    assert not wrong, "\n".join(wrong)
    return found


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
    experts = [name for name in alone[False]["MixtralForCausalLM"]["tensors"] if ".experts.7." in name]
    assert len(experts) == battery.LAYERS * 3 * 2, "three linears of each layer, A and B"


@pytest.mark.parametrize("case", CASES)
def test_layouts_agree(case: str, sources: Path, alone: dict[bool, dict[str, Any]], ranks: RankServer) -> None:
    topology, names, use_dora = CASES[case]
    found = seen(ranks, sources, topology, names, use_dora)
    for name in names:
        assert found[name]["tensors"] == alone[use_dora][name]["tensors"]
        assert found[name]["losses"] == pytest.approx(alone[use_dora][name]["losses"], abs=1e-4), name
        assert found[name]["norms"][0] == pytest.approx(alone[use_dora][name]["norms"][0], rel=1e-5), name


def test_experts_are_saved_and_resumed(sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    """Bit for bit under expert parallelism, and under another layout."""
    source, peft = str(sources / "MixtralForCausalLM"), {"name": "lora"}

    def train(topology: Topology, folder: str, **kwargs: Any) -> dict[str, Any]:
        given = {"run_dir": str(tmp_path / folder), "source": source, "peft": peft, "steps": 4, **kwargs}
        result: dict[str, Any] = ranks.run("tests.cases.peft:train", topology=topology, kwargs=given)[0]
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
