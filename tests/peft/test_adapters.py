"""Adapters: the same curve under every layout and as transformers', there and back as a PEFT folder, merged, saved and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabridge.parallel.topology import Topology
from tests.support.covering import further
from tests.support.rank_server import RankServer

SINGLE = Topology()
LAYOUTS = [Topology(tp=2), Topology(pp=2), Topology(dp=2), Topology(tp=2, pp=2), Topology(pp=2, vpp=2), Topology(tp=4)]
STEPS = 20
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "dora": {"name": "dora"},
    "some": {"name": "lora", "target_modules": ["q_proj", "v_proj", "gate_proj", "layers.1.mlp.down_proj"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "source"
    ranks.run("tests.support.peft:make", kwargs={"folder": str(folder)})
    return folder


@pytest.fixture(scope="module")
def runs(ranks: RankServer, source: Path) -> dict[str, dict[str, Any]]:
    """Of each kind: a run on one rank of no steps, and one of STEPS."""
    found = {}
    for kind, peft in KINDS.items():
        for steps in (0, STEPS):
            found[f"{kind}{steps}"] = train(ranks, SINGLE, source, source.parent / f"{kind}{steps}", peft, steps=steps)[0]
    return found


def train(
    ranks: RankServer, topology: Topology, source: Path, folder: Path, peft: dict[str, Any], **kwargs: Any
) -> list[dict[str, Any]]:
    given = {"run_dir": str(folder), "source": str(source), "peft": peft, **kwargs}
    results: list[dict[str, Any]] = ranks.run("tests.support.peft:train", topology=topology, kwargs=given)
    return results


def prompt() -> torch.Tensor:
    from tests.support import models, tiny

    return models.prompt(tiny.VOCABULARY, length=tiny.SEQUENCE)


def far(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


CURVES = [("lora", Topology(tp=2, pp=2)), ("dora", Topology(tp=2)), ("some", Topology(pp=2, vpp=2))]
"""Four ranks are run with LoRA on every linear alone."""


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        *CURVES,
        *further(
            *(
                (kind, topology)
                for kind in KINDS
                for topology in LAYOUTS
                if (kind, topology) not in CURVES and (kind == "lora" or topology.world_size <= 2)
            )
        ),
    ],
    ids=str,
)
def test_every_layout_has_the_same_curve(
    ranks: RankServer, source: Path, runs: dict[str, Any], tmp_path: Path, kind: str, topology: Topology
) -> None:
    expected = runs[f"{kind}{STEPS}"]
    result = train(ranks, topology, source, tmp_path, KINDS[kind], steps=STEPS)[0]
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert expected["losses"][-1] < expected["losses"][0] - 1
    assert far(result["adapters"], expected["adapters"]) < 1e-4


def test_layers_that_are_computed_again_learn_the_same(
    ranks: RankServer, source: Path, runs: dict[str, Any], tmp_path: Path
) -> None:
    """The first layer's input has no gradient of its own where the embedding is frozen."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    result = train(ranks, SINGLE, source, tmp_path, KINDS["lora"], steps=3, provider=recompute)[0]
    assert result["losses"] == pytest.approx(runs[f"lora{STEPS}"]["losses"][:3], abs=1e-6)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_stage_may_have_no_adapter(ranks: RankServer, source: Path, tmp_path: Path, layer: int) -> None:
    peft = {"name": "lora", "target_modules": [f"layers.{layer}.mlp.*"]}
    alone = train(ranks, SINGLE, source, tmp_path / "alone", peft, steps=4)[0]
    first = train(ranks, Topology(pp=2), source, tmp_path / "stages", peft, steps=4, stop_after=2)[0]
    second = train(ranks, Topology(pp=2), source, tmp_path / "stages", peft, steps=4, resume="auto")[0]
    assert first["losses"] + second["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert far(second["adapters"], alone["adapters"]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_with_adapters_has_the_same_curve(ranks: RankServer, source: Path, runs: dict[str, Any], kind: str) -> None:
    """Begun with the folder that a run of no steps wrote: the same data, optimizer and first values."""
    kwargs = {"base": str(source), "adapter": str(source.parent / f"{kind}0" / "adapter"), "steps": STEPS}
    losses = ranks.run("tests.support.peft_reference:train", kwargs=kwargs)[0]
    assert runs[f"{kind}{STEPS}"]["losses"] == pytest.approx(losses, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_has_the_same_logits_merge_and_curve(ranks: RankServer, source: Path, runs: dict[str, Any], kind: str) -> None:
    trained, begun = (source.parent / f"{kind}{steps}" for steps in (STEPS, 0))
    kwargs = {"base": str(source), "adapter": str(trained / "adapter"), "tokens": prompt(), "steps": 0}
    seen = ranks.run("tests.support.peft_reference:by_peft", kwargs=kwargs)[0]
    assert torch.allclose(seen["logits"], runs[f"{kind}{STEPS}"]["logits"], atol=1e-4)
    ours = load_file(trained / "merged" / "model.safetensors")
    assert max(float((seen["merged"][name] - tensor).abs().max()) for name, tensor in ours.items()) <= 1e-6
    kwargs = {"base": str(source), "adapter": str(begun / "adapter"), "steps": STEPS, "with_peft": True}
    losses = ranks.run("tests.support.peft_reference:train", kwargs=kwargs)[0]
    assert runs[f"{kind}{STEPS}"]["losses"] == pytest.approx(losses, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_says_what_the_model_says(ranks: RankServer, source: Path, runs: dict[str, Any], kind: str) -> None:
    folder, run = source.parent / f"{kind}{STEPS}", runs[f"{kind}{STEPS}"]
    kwargs = {"base": str(source), "adapter": str(folder / "adapter")}
    logits = ranks.run("tests.support.peft_reference:logits", kwargs={**kwargs, "tokens": prompt()})[0]
    assert torch.allclose(logits, run["logits"], atol=1e-4)
    assert not torch.allclose(logits, runs[f"{kind}0"]["logits"], atol=1e-1)
    merged = ranks.run("tests.support.peft_reference:merged", kwargs=kwargs)[0]
    base, ours = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(base[name], tensor), "the frozen weights have moved"
        expected = merged.get(name.removesuffix(".weight"), tensor)
        assert float((ours[name] - expected).abs().max()) <= 1e-6
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "megabridge.json",
    }  # fmt: skip


def test_the_output_layer_where_it_is_named(ranks: RankServer, tmp_path: Path) -> None:
    """An untied one, whose vocabulary tensor parallelism pads; both kinds of adapters."""
    source = tmp_path / "source"
    ranks.run("tests.support.peft:make", kwargs={"folder": str(source), "tie_word_embeddings": False})
    for kind in ("lora", "dora"):
        peft = {"name": kind, "target_modules": ["lm_head", "o_proj"]}
        alone = train(ranks, SINGLE, source, tmp_path / kind, peft, steps=4)[0]
        cut = train(ranks, Topology(tp=2), source, tmp_path / f"{kind}2", peft, steps=4)[0]
        assert cut["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert cut["adapters"]["base_model.model.lm_head.lora_B.weight"].shape == (61, 4)
        kwargs = {"base": str(source), "adapter": str(tmp_path / f"{kind}2" / "adapter"), "tokens": prompt()}
        assert torch.allclose(ranks.run("tests.support.peft_reference:logits", kwargs=kwargs)[0], cut["logits"], atol=1e-4)


def test_names_and_settings_are_those_of_peft(source: Path, runs: dict[str, Any]) -> None:
    tensors = load_file(source.parent / f"some{STEPS}" / "adapter" / "adapter_model.safetensors")
    modules = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"]
    expected = {f"model.layers.{layer}.{module}" for layer in range(4) for module in modules} | {"model.layers.1.mlp.down_proj"}
    assert tensors.keys() == {f"base_model.model.{module}.{part}.weight" for module in expected for part in ("lora_A", "lora_B")}
    config = json.loads((source.parent / f"some{STEPS}" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(expected), "down_proj alone would name other layers' too"
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 4, 8, True)
    config = json.loads((source.parent / f"dora{STEPS}" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@pytest.mark.parametrize(("kind", "topology"), [("some", SINGLE), ("lora", Topology(tp=2, pp=2)), ("dora", Topology(tp=4))])
def test_a_folder_comes_back_bit_for_bit(
    ranks: RankServer, source: Path, runs: dict[str, Any], tmp_path: Path, kind: str, topology: Topology
) -> None:
    folder = source.parent / f"{kind}{STEPS}" / "adapter"
    kwargs = {"source": str(source), "adapter": str(folder), "out": str(tmp_path / "out")}
    logits = ranks.run("tests.support.peft:again", topology=topology, kwargs=kwargs)[0]
    assert torch.allclose(logits, runs[f"{kind}{STEPS}"]["logits"], atol=1e-4)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        *(("dora", Topology(tp=2)), ("lora", Topology(pp=2)), ("some", Topology(dp=2))),
        *further(("lora", SINGLE), ("some", Topology(tp=2))),
    ],
)
def test_two_halves_equal_the_whole(ranks: RankServer, source: Path, tmp_path: Path, kind: str, topology: Topology) -> None:
    peft = {**KINDS[kind], "lora_dropout": 0.0 if kind == "dora" else 0.1}
    whole = train(ranks, topology, source, tmp_path / "whole", peft, steps=6)
    first = train(ranks, topology, source, tmp_path / "halves", peft, steps=6, stop_after=3)
    second = train(ranks, topology, source, tmp_path / "halves", peft, steps=6, resume="auto")
    assert len(first[0]["losses"]) == 3
    assert first[0]["losses"] + second[0]["losses"] == whole[0]["losses"]
    assert first[0]["norms"] + second[0]["norms"] == whole[0]["norms"]
    assert far(second[0]["adapters"], whole[0]["adapters"]) == 0.0


def test_a_native_checkpoint_has_adapters_alone_and_any_layout_goes_on(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    peft = KINDS["lora"]
    train(ranks, Topology(tp=2, pp=2), source, tmp_path / "run", peft, steps=6, stop_after=3)
    native = tmp_path / "run" / "checkpoints" / "step_3" / "native"
    names = ranks.run("tests.support.peft:stored_names", kwargs={"folder": str(native)})[0]
    linears = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    assert set(names) == {
        f"decoder.layers.{layer}.{linear}.adapter.{part}"
        for layer in range(4) for linear in linears for part in ("lora_A", "lora_B")
    }  # fmt: skip
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    same = train(ranks, Topology(tp=2, pp=2), source, tmp_path / "run", peft, steps=6, resume="auto")[0]
    other = train(ranks, Topology(pp=2, vpp=2), source, tmp_path / "other", peft, steps=6, resume="auto")[0]
    assert other["losses"] == pytest.approx(same["losses"], abs=1e-4) and len(same["losses"]) == 3
    assert far(other["adapters"], same["adapters"]) < 1e-4


def test_a_native_checkpoint_in_one_call(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    run = train(ranks, SINGLE, source, tmp_path / "run", KINDS["dora"], steps=3, save_at_end=True)[0]
    kwargs = {"source": str(source), "native": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    logits = ranks.run("tests.support.peft:from_native", topology=Topology(tp=2), kwargs=kwargs)[0]
    assert torch.allclose(logits, run["logits"], atol=1e-4)
    saved = tmp_path / "run" / "checkpoints" / "step_3" / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == saved.read_bytes()
    merged = [load_file(folder / "merged" / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "run")]
    assert far(*merged) < 1e-6
    native = str(tmp_path / "run" / "checkpoints" / "step_3" / "native")
    for merge, name in ((False, "adapter/adapter_model.safetensors"), (True, "hf/model.safetensors")):
        kwargs = {
            "run_dir": str(tmp_path / name[:2]),
            "source": str(source),
            "native": native,
            "peft": {**KINDS["dora"], "merge": merge},
        }
        ranks.run("tests.support.peft:convert", topology=Topology(pp=2), kwargs=kwargs)
        assert far(load_file(tmp_path / name[:2] / name), merged[1] if merge else load_file(saved)) < 1e-6


def test_adapters_that_peft_began_in_its_ways(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    """Those that leave the weights as they are, and one that PEFT has made plain, say here what they say there; others are refused."""
    kwargs = {"base": str(source), "root": str(tmp_path), "tokens": prompt()}
    theirs = ranks.run("tests.support.peft_reference:begun", kwargs=kwargs)[0]
    assert len(theirs) == 6
    paths = [{"source": str(source), "adapter": str(tmp_path / name), "out": str(tmp_path / f"{name}-again")} for name in theirs]
    ours = ranks.run("tests.support.peft:all_again", kwargs={"calls": paths})[0]
    for (name, (logits, trained)), logits_here in zip(theirs.items(), ours, strict=True):
        assert torch.allclose(logits_here, logits, atol=1e-4), name
        assert torch.allclose(logits, trained, atol=1e-4), "PEFT itself reads another model than it trained"
    calls = [("new", {"path": str(tmp_path / name)}) for name in ("plain/pissa", "plain/olora")]
    for text in ranks.run("tests.support.peft:refusals", kwargs={"source": str(source), "calls": calls})[0]:
        assert text.startswith("ConfigError") and "init_lora_weights=" in text


def test_what_is_refused(ranks: RankServer, source: Path, runs: dict[str, Any], tmp_path: Path) -> None:
    good = source.parent / f"lora{STEPS}" / "adapter"

    def changed(name: str, change: Any = None, **settings: Any) -> dict[str, str]:
        shutil.copytree(good, tmp_path / name)
        content = json.loads((good / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**content, **settings}))
        if change is not None:
            tensors = load_file(good / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        return {"path": str(tmp_path / name)}

    def without_weights(name: str) -> dict[str, str]:
        out = changed(name)
        (tmp_path / name / "adapter_model.safetensors").rename(tmp_path / name / "adapter_model.bin")
        return out

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("lora", {"target_modules": ("q_prj", "embed_tokens", "v_proj")}, "'q_prj' matches the end of no linear's name"),
        ("lora", {"target_modules": ("lm_head",)}, "'lm_head' matches the end of no linear's name"),
        ("lora", {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "leaves no linear"),
        ("lora", {"r": 0, "lora_dropout": 1.0}, "r=0 must be at least 1"),
        ("import", changed("alpha", lora_alpha=16), "lora_alpha=16.0, here 8"),
        ("import", changed("bias", bias="all", modules_to_save=["lm_head"]), "bias='all' can't be represented: it must be 'none'"),
        (
            "import",
            changed("missing", lambda tensors: tensors.pop(first)),
            "missing: base_model.model.model.layers.0.self_attn.q_proj",
        ),
        ("new", changed("strange", lambda tensors: tensors.update({"x.weight": torch.zeros(1)})), "x.weight"),
        ("new", changed("nan", lambda tensors: tensors[first].fill_(float("nan"))), "NaN"),
        ("new", without_weights("pickled"), "it has adapter_model.bin; save it again with safe_serialization=True"),
        ("new", {"path": str(source)}, "must hold adapter_config.json"),
        ("new", changed("pissa", init_lora_weights="pissa_niter_4"), "Save the adapter with PEFT's path_initial_model"),
        ("new", changed("rank", r=10**9), "r=1000000000 can't be represented"),
        ("new", changed("other", r=60000), "lora_A.weight [4, 32] must have two dimensions, number 0 of size r=60000"),
    ]
    said = ranks.run("tests.support.peft:refusals", kwargs={"source": str(source), "calls": [case[:2] for case in cases]})[0]
    for (_, _, message), text in zip(cases, said, strict=True):
        assert message in text, text
