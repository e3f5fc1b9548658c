"""What a single process does with a bridge, with no process group set up for it."""

from __future__ import annotations

import gc
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MambaConfig

from megabridge import AutoBridge
from megabridge.errors import MegabridgeError
from tests.support.models import TINY


def refusal(call: Any) -> str:
    """Type and message of what `call` raises."""
    try:
        call()
    except MegabridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def trusted(source: str, out: Path) -> list[list[str]]:
    """The *.py files of an export without and with trust_remote_code."""
    found = []
    for trust in (False, True):
        bridge = AutoBridge.from_hf_pretrained(source, trust_remote_code=trust)
        bridge.save_hf_pretrained(bridge.to_megatron_model(), out / f"trust_{trust}", show_progress=False)
        found.append([path.name for path in (out / f"trust_{trust}").glob("*.py")])
    return found


def released(source: str) -> list[int]:
    """Parameters that are left of a model after it was imported, planned, exported and streamed, and went; its bridge lives."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model()
    known = [weakref.ref(parameter) for chunk in model for parameter in chunk.parameters()]
    bridge.get_conversion_tasks(model)
    assert sum(1 for _ in bridge.export_hf_weights(model, show_progress=False)) > 1
    with tempfile.TemporaryDirectory() as out:
        bridge.save_hf_weights(model, Path(out) / "weights", show_progress=False)
    tensors = bridge.plan(model).tensors
    del model
    gc.collect()
    left = [number for number, parameter in enumerate(known) if parameter() is not None]
    assert bridge.plan(bridge.to_megatron_model(load_weights=False)).tensors is tensors  # it was kept all the same
    return left


def surface(source: str, out: str) -> dict[str, Any]:
    """Every public name that needs no second rank, used once."""
    other = Path(out) / "other"
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    bridge = AutoBridge.from_hf_pretrained(source)
    # First: the refusal of a process that has no groups yet.
    too_few = refusal(lambda: bridge.to_megatron_model(tensor_model_parallel_size=8, pipeline_model_parallel_size=2))
    model = bridge.to_megatron_model()
    weights = bridge.save_hf_weights(model, Path(out) / "weights", show_progress=False)
    from_config = AutoBridge.from_hf_config(
        LlamaConfig(**{k: v for k, v in TINY.items() if k not in ("architectures", "model_type")})
    )
    bare = from_config.to_megatron_model(load_weights=False)
    return {
        "supported": AutoBridge.list_supported_models(),
        "handles": [AutoBridge.can_handle(source), AutoBridge.can_handle(other)],
        "supports": [AutoBridge.supports(TINY), AutoBridge.supports(LlamaConfig()), AutoBridge.supports(MambaConfig())],
        "not every head": AutoBridge.supports({**TINY, "num_key_value_heads": 3}),
        "dtypes": [
            str(AutoBridge.from_hf_pretrained(source, torch_dtype=name, device_map="cpu").source.dtype)
            for name in ("auto", "float16")
        ],
        "trusted": trusted(source, Path(out)),
        "hidden_size": from_config.transformer_config.hidden_size,
        "loaded": from_config.load_hf_weights(bare, source, show_progress=False).mismatched,
        "weights": (weights.tensors, weights.mismatched, sorted(path.name for path in (Path(out) / "weights").iterdir())),
        "refusals": {
            "no weights": refusal(lambda: from_config.to_megatron_provider()),
            "unknown folder": refusal(lambda: AutoBridge.can_handle(Path(out) / "nothing")),
            "other architecture": refusal(lambda: bridge.load_hf_weights(model, other)),
            "unsupported": refusal(lambda: AutoBridge.from_hf_pretrained(other)),
            "dtype": refusal(lambda: AutoBridge.from_hf_pretrained(source, dtype="int8")),
            "device": refusal(lambda: AutoBridge.from_hf_pretrained(source, device_map="balanced")),
            "no CUDA": refusal(lambda: AutoBridge.from_hf_pretrained(source, device_map="cuda:1")),
            "two dtypes": refusal(lambda: AutoBridge.from_hf_pretrained(source, dtype="float32", torch_dtype="float16")),
            "no MLA": refusal(lambda: bridge.mla_transformer_config),
            "no use": refusal(lambda: bridge.to_megatron_provider(load_weights=False, hf_path=source)),
            "source dtype": refusal(
                lambda: AutoBridge.from_hf_pretrained(source).save_hf_weights(model, out, weight_dtype="source")
            ),
            "shard size": refusal(lambda: bridge.save_hf_weights(model, Path(out) / "x", max_shard_size="5 potatoes")),
            "more processes": too_few,
        },
    }
