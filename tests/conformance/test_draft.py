"""Drafts: of models whose parts are known they pass all checks as they are; of others they can be imported and say what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabridge.conformance.architecture import read_model
from megabridge.conformance.draft import draft
from megabridge.errors import ConfigError
from tests.support.rank_server import RankServer

# jais2 and cwm are no families of ours.
PASSING = [
    "LlamaForCausalLM", "ArceeForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Olmo3ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel",
    "GPTNeoXForCausalLM", "GraniteForCausalLM", "Starcoder2ForCausalLM", "SeedOssForCausalLM", "jais2", "cwm",
]  # fmt: skip
UNKNOWN = {
    "apertus": ["'xielu' is none of", "model.layers.{layer}.mlp.act_fn.alpha_p [1], in every layer", "no norm before or after"],
    "diffllama": ["model.layers.{layer}.self_attn.lambda_k1 [8], in every layer"],
    "qwen3_moe": [
        "model.layers.{layer}.mlp.experts.*.gate_proj.weight [768, 64], in every layer",
        "the key 'num_local_experts': 128",
        "no MLP",
    ],
    "bitnet": ["model.layers.{layer}.mlp.ffn_sub_norm.weight [96], in every layer"],
    "phi": ["the tensor lm_head.bias [131]"],
}


def test_drafts(ranks: RankServer, tmp_path: Path) -> None:
    (found,) = ranks.run(
        "tests.support.conformance:drafts", kwargs={"root": str(tmp_path), "names": [*PASSING, *UNKNOWN]}, timeout=300
    )
    assert not {name: found[name]["problems"] for name in PASSING if found[name]["problems"]}
    assert not {
        name: found[name]["todo"]
        for name in PASSING
        if any("no rule" in line or "no field" in line for line in found[name]["todo"])
    }
    for name, expected in UNKNOWN.items():
        for words in expected:
            assert any(words in line for line in found[name]["todo"]), (name, words, found[name]["todo"])
            assert words in found[name]["text"], "the file says it too"
        assert found[name]["problems"], name


def test_what_no_draft_can_be_made_of() -> None:
    with pytest.raises(ConfigError, match="must have 'architectures', a list"):
        draft({"model_type": "x"}, {}, "here")
    injected = "x'); import os; os.system('true"
    for key in ("architectures", "model_type", "hidden_act", "rms_norm_eps", "vocab_size", "layer_types", "rope_theta"):
        given = {
            "architectures": ["X"],
            "model_type": "x",
            key: [injected] if key in ("architectures", "layer_types") else injected,
        }
        with pytest.raises(ConfigError, match=key):
            draft(given, {}, "here")
    with pytest.raises(ConfigError, match=r"the tensor .a\.0\.b\.weight"):
        draft({"architectures": ["X"], "model_type": "x"}, {f"a.0.b.weight\n{injected}": (4, 4)}, "here")
    with pytest.raises(ConfigError, match="must have layers"):
        read_model({}, {"embed.weight": (4, 4)}, {})
    with pytest.raises(ConfigError, match="vocab_size: vocab_size or padded_vocab_size"):
        read_model({"n_layer": 1, "n_embd": 4, "n_head": 1}, {"h.0.weight": (4, 4)}, {})
