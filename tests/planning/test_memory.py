"""The memory that recipe=plan expects against what ranks hold in truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megabridge.families import all_families
from megabridge.parallel.topology import Topology
from tests.support.models import TINY
from tests.support.rank_server import RankError, RankServer
from tests.support.recipe_runs import values

SHAPE = {**TINY, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
MIXTURE = {
    **{key: value for key, value in SHAPE.items() if key not in ("attention_bias", "mlp_bias")},
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
STACKED = {**all_families()["GraniteMoeForCausalLM"].tiny, "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: dict[str, tuple[Topology, dict[str, Any]]] = {
    "single": (Topology(), {}),
    "bf16": (Topology(), {"dtype": "bfloat16"}),
    "recomputed": (Topology(), {"provider": FULL}),
    "tp2": (Topology(tp=2), {}),
    "tp2-sequence": (Topology(tp=2), {"sequence": True}),
    "dp2": (Topology(dp=2), {"dtype": "bfloat16"}),
    "pp2": (Topology(pp=2), {"micro_batches": 4}),
    "pp2vpp2": (Topology(pp=2, vpp=2), {"micro_batches": 4}),
    "pp2-recomputed": (Topology(pp=2), {"provider": FULL}),
    "lora": (Topology(), {"peft": {"name": "lora"}}),
    "lora-stage": (Topology(pp=2), {"peft": {"name": "lora", "target_modules": ["layers.3.mlp.up_proj"]}}),
    "lora-stacked": (Topology(ep=2, dp=2), {"hf": STACKED, "peft": {"name": "lora", "target_parameters": ["experts.*"]}}),
    "frozen": (Topology(pp=2), {"freeze": ["*", "!*layers.3*"]}),
    "experts": (Topology(), {"hf": MIXTURE}),
    "ep2": (Topology(ep=2, dp=2), {"hf": MIXTURE, "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_expected_memory_is_held(ranks: RankServer, tmp_path: Path, case: str) -> None:
    topology, settings = CASES[case]
    model = {
        "hf": settings.get("hf", SHAPE),
        "load_weights": False,
        "dtype": settings.get("dtype", "float32"),
        "provider": settings.get("provider", {}),
    }
    rows = settings.get("micro_batches", 2) * topology.dp
    recipe = {"seq_length": 128, "micro_batch_size": 1, "global_batch_size": rows}
    config = values(tmp_path, None, topology, model=model, recipe=recipe)
    config["parallel"] |= {"dp": topology.dp, "ep": topology.ep}
    config["parallel"]["sequence_parallel"] = settings.get("sequence", False)
    config["peft"] = settings.get("peft", {"name": "none"})
    config["optimizer"] = {"freeze": settings.get("freeze", [])}
    (expected,) = ranks.run("tests.support.expected_memory:expected", world_size=1, kwargs={"values": config})
    held = ranks.run("tests.support.expected_memory:held", topology=topology, kwargs={"values": config})
    for rank, found in enumerate(held):
        stage = expected[topology.coordinate(rank).pp]
        assert found["parameters"] == stage["parameters"]
        # Buffers are padded to multiples of 128 x dp elements, each of a few.
        assert found["gradients"] == pytest.approx(stage["gradients"], abs=4 * 128 * 8)
        assert found["optimizer"] == pytest.approx(stage["optimizer"], abs=12 * 128 * 8)
        if settings.get("dtype") == "bfloat16":
            continue  # on a CPU torch's RMSNorm keeps a copy in fp32 of its input, on CUDA the input
        # Experts get unequal numbers of tokens, and the CPU's attention keeps no more than CUDA's.
        assert found["activations"] == pytest.approx(stage["activations"], rel=0.15 if "hf" in settings else 0.02), case


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "linears": ({"peft": {"name": "lora", "target_modules": ["q_prj", "up_proj"]}}, "'q_prj' matches the end of no linear's name"),
    "excluded": ({"peft": {"name": "lora", "exclude_modules": ["embed"]}}, "'embed' matches the end of no linear's name"),
    "parameters": (
        {"peft": {"name": "lora", "target_parameters": ["experts.down_proj", "up_proj"]}},
        "this model has none):\n  'experts.down_proj' matches the end of no parameter's name\n  "
        "'up_proj' matches the end of no parameter's name; name it in target_modules",
    ),
    "frozen": ({"optimizer": {"freeze": ["*norm*", "*.attn.*"]}}, "'*.attn.*' matches no Hugging Face and no native name"),
    "fused": ({"optimizer": {"freeze": ["*gate_proj*"]}}, "linear_fc1.weight is one parameter of"),
    "all": ({"optimizer": {"freeze": ["*"]}}, "nothing is left to train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_refuses_the_names_that_a_run_refuses(ranks: RankServer, tmp_path: Path, case: str) -> None:
    settings, message = REFUSED[case]
    topology = Topology(pp=2)
    config = values(tmp_path, None, topology, model={"hf": SHAPE, "load_weights": False}) | settings
    said = []
    for target, where in (("expected", {"world_size": 1}), ("held", {"topology": topology})):
        with pytest.raises(RankError) as error:
            ranks.run(f"tests.support.expected_memory:{target}", kwargs={"values": config}, **where)  # type: ignore[arg-type]
        said.append(error.value.failure["error"])
    assert said[0] == said[1] and message in said[0]
