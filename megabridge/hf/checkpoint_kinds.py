"""What kind of checkpoint a folder holds that isn't the model its config.json says, told by the names of its tensors. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

_ADAPTER: Final = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w1_a)\b")
_QUANTISED: Final = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(absmax|quant_map|nested_absmax|quant_state\.|SCB$)"), "bitsandbytes"),
    (re.compile(r"\.(weight_packed|weight_scale|input_scale|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.(weight_scale_inv|_blocks|_scales)$"), "blocks with scales"),
)
_OPTIMIZER: Final = re.compile(r"(^|\.)(exp_avg|exp_avg_sq|optimizer|momentum_buffer|fp32_param)(\.|$)")
_NATIVE: Final = re.compile(
    r"(^|\.)(linear_qkv|linear_proj|linear_fc[12]|word_embeddings|query_key_value_layer)\.|^decoder\.layers\."
)
_WRAPPERS: Final = (
    ("base_model.model.", "PEFT", "merge_and_unload()"),
    ("_orig_mod.", "torch.compile", "the module inside it (._orig_mod)"),
    ("module.", "DistributedDataParallel", "the module inside it (.module)"),
    ("_fsdp_wrapped_module.", "FSDP", "a full state dict of the module inside it"),
    ("_forward_module.", "DeepSpeed", "the module inside it"),
)
_VISION: Final = re.compile(r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|vision_embed_tokens)\.")
_LAYER: Final = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def described(found: Collection[str], expected: Collection[str]) -> str:
    """What the tensors named `found` are and what to do, as a sentence; "" where nothing but single names is odd.

    `expected` are the names that a model's config asks for.
    """
    odd = [name for name in found if name not in set(expected)]
    if not odd:
        return ""
    if any(_ADAPTER.search(name) for name in odd):
        return _adapter(found)
    for pattern, method in _QUANTISED:
        if any(pattern.search(name) for name in odd):
            return (
                f"It is quantised by {method}, which is not read so: give the checkpoint that it was made of, or one in "
                "block-scaled FP8 or MXFP4 with its quantization_config."
            )
    for prefix, wrapper, remedy in _WRAPPERS:
        if sum(prefix in name for name in odd) > len(odd) / 2:
            return f"Its names have {prefix!r}, which {wrapper} puts before them: save {remedy}, and give that."
    if any(_NATIVE.search(name) for name in odd):
        return (
            "It holds Megatron's own parameters: export it with recipe=convert conversion.mode=export "
            "checkpoint.resume=<native folder>, and give that."
        )
    if sum(bool(_OPTIMIZER.search(name)) for name in odd) > len(odd) / 2:
        return "It holds an optimizer's state beside or in place of a model: give the folder with the weights alone."
    if any(_VISION.search(name) for name in odd):
        return "It is a model with images or sound, of which only text models convert: give the text model's own checkpoint."
    return _shape(found, expected)


def _adapter(found: Collection[str]) -> str:
    if all(_ADAPTER.search(name) for name in found):
        return (
            "It holds adapters alone: give the model that they were trained beside as model.path, and this folder as peft.path "
            "with peft=lora; a run publishes whole models with peft.merge=true."
        )
    return (
        "It holds adapters beside their model: merge them (merge_and_unload() of PEFT, or peft.merge=true of the run that trained "
        "them), and give that."
    )


def _shape(found: Collection[str], expected: Collection[str]) -> str:
    """Where whole parts of the names differ: a prefix that all lack or have, or the number of layers."""
    stems, wanted = _stem(found), _stem(expected)
    same = {name.removeprefix(stems) for name in found} & {name.removeprefix(wanted) for name in expected}
    if stems != wanted and len(same) > len(expected) / 2:
        return (
            f"Its names begin with {stems or 'no prefix'!r} where the model's begin with {wanted or 'no prefix'!r}: it was saved "
            "of another class; load it with AutoModelForCausalLM and save that."
        )
    layers, asked = _layers(found), _layers(expected)
    if layers != asked and layers and asked:
        return f"It has {layers} layers, and its config.json says {asked}: the two are of different models."
    return ""


def _stem(names: Collection[str]) -> str:
    """What stands before the layers' part in the names."""
    before = [match.string[: match.start() + 1] for name in names if (match := _LAYER.search(f".{name}")) is not None]
    return min(before)[1:] if len(set(before)) == 1 else ""


def _layers(names: Collection[str]) -> int:
    return max((int(match[1]) + 1 for name in names if (match := _LAYER.search(f".{name}")) is not None), default=0)
