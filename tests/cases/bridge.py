"""What a single process does with a bridge, with no process group set up for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MambaConfig

from megabridge import AutoBridge
from megabridge.errors import MegabridgeError
from tests.cases.models import TINY


def refusal(call: Any) -> str:
    """Type and message of what `call` raises."""
    try:
        call()
    except MegabridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


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
        "hidden_size": from_config.transformer_config.hidden_size,
        "loaded": from_config.load_hf_weights(bare, source, show_progress=False).mismatched,
        "weights": (weights.tensors, weights.mismatched, sorted(path.name for path in (Path(out) / "weights").iterdir())),
        "refusals": {
            "no weights": refusal(lambda: from_config.to_megatron_provider()),
            "unknown folder": refusal(lambda: AutoBridge.can_handle(Path(out) / "nothing")),
            "other architecture": refusal(lambda: bridge.load_hf_weights(model, other)),
            "unsupported": refusal(lambda: AutoBridge.from_hf_pretrained(other)),
            "dtype": refusal(lambda: AutoBridge.from_hf_pretrained(source, dtype="int8")),
            "remote code": refusal(lambda: AutoBridge.from_hf_pretrained(source, trust_remote_code=True)),
            "source dtype": refusal(
                lambda: AutoBridge.from_hf_pretrained(source).save_hf_weights(model, out, weight_dtype="source")
            ),
            "shard size": refusal(lambda: bridge.save_hf_weights(model, Path(out) / "x", max_shard_size="5 potatoes")),
            "more processes": too_few,
        },
    }
