"""AutoBridge's public names, on one process without any set-up by the user."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.models import TINY
from tests.support.payload import payload
from tests.support.rank_server import RankServer

EXPECTED = {
    "no weights": "ConfigError: a bridge made from a config has no weights",
    "unknown folder": "CheckpointError",
    "other architecture": "is a MambaForCausalLM, this bridge converts LlamaForCausalLM",
    "unsupported": "ConfigError: architecture 'MambaForCausalLM' is not supported",
    "dtype": "ConfigError: dtype='int8' must be one of",
    "device": "ConfigError: device_map='balanced' must be 'auto', 'cpu', 'cuda' or 'cuda:<n>'",
    "no CUDA": "ConfigError: device_map='cuda:1' needs a CUDA device",
    "two dtypes": "are two names for one thing",
    "no MLA": "LlamaForCausalLM has no multi-latent attention; use transformer_config",
    "no use": "has no meaning with load_weights=False",
    "source dtype": "ConfigError: weight_dtype='source' needs an earlier import",
    "shard size": "ConfigError: max_shard_size='5 potatoes'",
    "more processes": "torchrun --nproc-per-node=16",
}


def test_every_name_without_set_up(ranks: RankServer, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    ranks.run("tests.support.models:write_model", kwargs={"folder": tmp_path / "source", "config": TINY})
    config = {**TINY, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "source" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    kwargs = {"source": str(tmp_path / "source"), "out": str(tmp_path / "out")}
    (seen,) = ranks.run("tests.support.bridge:surface", world_size=1, kwargs=kwargs)
    assert "LlamaForCausalLM" in seen["supported"]
    assert seen["handles"] == [True, False] and seen["supports"] == [True, True, False]
    assert not seen["not every head"], "what converts is what a provider can be made of"
    assert seen["dtypes"] == ["torch.float32", "torch.float16"]
    assert seen["trusted"] == [[], ["evil.py"]]
    assert seen["hidden_size"] == TINY["hidden_size"] and seen["loaded"] == ()
    tensors = payload(tmp_path / "source")
    assert seen["weights"] == (len(tensors), (), ["megabridge.json", "model.safetensors"])
    assert payload(tmp_path / "out" / "weights") == tensors
    assert seen["refusals"].keys() == EXPECTED.keys()
    for name, part in EXPECTED.items():
        assert part in seen["refusals"][name], f"{name}: {seen['refusals'][name]}"
    assert ranks.run("tests.support.bridge:released", world_size=1, kwargs={"source": kwargs["source"]}) == [[]]
    assert not marker.exists(), "code that came with the checkpoint was run"
