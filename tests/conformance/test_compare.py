"""The comparison module by module: nothing differs in a right model, and in a wrong one the culprit is named, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megabridge.config.schema import Config, ModelConfig
from megabridge.errors import ConfigError
from megabridge.families import all_families
from megabridge.parallel.topology import Topology
from recipes import compare
from tests.support.covering import cover, further
from tests.support.families import MIXTURES
from tests.support.rank_server import RankServer

CASES = "tests.support.conformance"
ARCHITECTURES = sorted({*all_families()} - {*MIXTURES})  # layouts here are without sequence parallelism, which mixtures need
ROPE = {"rope_type": "default", "rope_theta": 2e4}
BROKEN: list[tuple[str, dict[str, Any], str, str]] = [
    ("LlamaForCausalLM", {"rope": ROPE}, "model.layers.0.self_attn", "before model.layers.0.self_attn.o_proj"),
    ("LlamaForCausalLM", {"layernorm_epsilon": 0.1}, "model.layers.0.input_layernorm", "its outputs differ"),
    ("LlamaForCausalLM", {"swapped": True}, "model.layers.0.input_layernorm", "which doesn't differ"),
    ("LlamaForCausalLM", {"activation_func": "gelu"}, "model.layers.0.mlp", "before model.layers.0.mlp.down_proj"),
    ("SmolLM3ForCausalLM", {"no_rope_freq": [0, 0, 0, 1, 0]}, "model.layers.1.self_attn", "before model.layers.1.self_attn.o_proj"),
    ("Gemma2ForCausalLM", {"embedding_multiplier": 7.0}, "model.embed_tokens", "its outputs differ"),
    ("GraniteForCausalLM", {"embedding_multiplier": 7.0}, "model", "before model.layers.0"),
    ("GraniteForCausalLM", {"residual_multiplier": 0.3}, "model.layers.0", "before model.layers.0.post_attention_layernorm"),
    ("GraniteForCausalLM", {"logits_multiplier": 0.3}, "logits", "nothing before them"),
    ("Gemma3ForCausalLM", {"local_rope": ROPE}, "model.layers.0.self_attn", "before model.layers.0.self_attn.o_proj"),
]


@pytest.fixture(scope="module")
def root(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    ranks.run(f"{CASES}:make", kwargs={"root": str(folder), "architectures": ARCHITECTURES}, timeout=300)
    return folder


RIGHT = {"tp2": (Topology(tp=2), True), "tp4": (Topology(tp=4), False), "pp2vpp2": (Topology(pp=2, vpp=2), False)}
COVER = cover(ARCHITECTURES, list(RIGHT))


@pytest.mark.cover
@pytest.mark.parametrize("layout", RIGHT)
def test_nothing_differs_where_all_is_right(ranks: RankServer, root: Path, tmp_path: Path, layout: str) -> None:
    topology, sp = RIGHT[layout]
    cases = [(name, {}) for name in COVER[layout]]
    kwargs = {"root": str(root), "out": str(tmp_path), "cases": cases, "sp": sp}
    seen = ranks.run(f"{CASES}:comparisons", topology=topology, kwargs=kwargs, timeout=400)
    found = dict(zip(COVER[layout], seen[0], strict=True))
    assert not {name: entry["fault"] for name, entry in found.items() if entry["fault"]}
    assert not {name: entry["not_compared"] for name, entry in found.items() if entry["not_compared"]}
    figures = {name: (entry["rows"], entry["worst"]) for name, entry in found.items()}
    assert not {name: pair for name, pair in figures.items() if pair[0] < 50 or not 0 <= pair[1] < 1e-4}
    assert all(rank == seen[0] for rank in seen)


@pytest.mark.parametrize(
    ("topology", "sp"),
    [(Topology(tp=2), True), *further((Topology(), False), (Topology(pp=2), False))],
    ids=lambda value: str(value),
)
def test_a_fault_is_traced_to_its_module(ranks: RankServer, root: Path, tmp_path: Path, topology: Topology, sp: bool) -> None:
    cases = [(name, settings) for name, settings, _, _ in BROKEN]
    kwargs = {"root": str(root), "out": str(tmp_path), "cases": cases, "sp": sp}
    seen = ranks.run(f"{CASES}:comparisons", topology=topology, kwargs=kwargs, timeout=200)[0]
    for (name, settings, module, why), entry in zip(BROKEN, seen, strict=True):
        assert entry["fault"] is not None, (name, settings)
        assert entry["fault"][0] == module and why in entry["fault"][1], (name, settings, entry["fault"])
        assert entry["lines"][-1].startswith(f"first difference: {module}: ")


def test_without_weights_it_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe=compare needs weights .* model\.path"):
        compare.main(Config(model=ModelConfig(name="tiny_llama"), run_dir=str(tmp_path)))
