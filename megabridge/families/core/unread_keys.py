"""Keys of config.json that no field of a family reads: harmless ones are ignored, others are refused.

No list can name all keys that change a computation. So a key counts as harmless if it is known to be, or if its value turns
nothing on (null, false, 0, empty) or is transformers' default; every other one is refused, until the user names it in ignore_keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Final

from megabridge.config.value_types import ANYTHING, FLAG, Kind, list_of, one_of, same, shown, text, whole

Json = Mapping[str, Any]

TOKEN: Final = whole(-1, 2**31 - 1).or_null()
TOKENS: Final = TOKEN.or_a(list_of(whole(0, 2**31 - 1)))
# Keys that any config.json may have and that no family reads, but other code does. `is_causal` and those after it are read by code
# of transformers that all models share.
COMMON: Final[Mapping[str, Kind]] = {
    "architectures": list_of(text()).or_null(),
    "model_type": text().or_null(),
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS,
    "pad_token_id": TOKENS,
    "quantization_config": ANYTHING,  # how weights are stored: quantization.py
    "is_causal": one_of(True, None),
    "is_decoder": FLAG.or_null(),  # as every model here is
    "is_encoder_decoder": one_of(False, None),
    "add_cross_attention": one_of(False, None),
    "per_layer_config": one_of(None, {}),
    "pruned_heads": one_of(None, {}),
}
_HARMLESS: Final = frozenset(
    # what transformers writes about itself and the file
    "_name_or_path name_or_path _commit_hash auto_map custom_pipelines dtype torch_dtype torchscript use_bfloat16 return_dict "
    "output_hidden_states output_attentions _output_attentions chunk_size_feed_forward use_cache _from_model_config "
    # choice between implementations of the same computation
    "attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset experts_implementation "
    "_experts_implementation _experts_implementation_internal _flash_attn_2_enabled use_flash_attn use_flash_attention "
    "use_flash_attention_2 pretraining_tp ep_size "
    # heads for classification
    "id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params classifier_activation "
    # tokens and texts
    "tokenizer_class tokenizer_model_max_length model_max_length max_sequence_length prefix sep_token_ids unk_token_id "
    # generation: GenerationConfig's
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation "
    "decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty "
    "epsilon_cutoff eta_cutoff exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length min_new_tokens "
    "min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences "
    "output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature "
    "top_k top_p typical_p use_mtp "
    # training: initial values, noise and losses
    "initializer_range gradient_checkpointing output_router_logits router_aux_loss_coef router_z_loss_coef aux_loss_alpha seq_aux "
    "router_jitter_noise input_jitter_noise label_smoothing "
    # other programs' notes
    "unsloth_fixed is_llama_config transformers.js_config model_name license".split()
)
_SHOWN: Final = 20
"""Number of unknown keys in a message."""
_HARMLESS_PATTERNS: Final = ("*_version", "*_token_id", "*_token_ids", "*_token_index", "*dropout", "*dropout_prob", "*_pdrop")


def is_harmless(key: str) -> bool:
    """Whether a key, with any value, is known not to affect what a model computes, or is read by other code than fields."""
    return key in COMMON or key in _HARMLESS or any(fnmatchcase(key, pattern) for pattern in _HARMLESS_PATTERNS)


def unread(hf: Json, known: Collection[str]) -> list[str]:
    """Returns the keys that are neither `known`, which fields read, nor harmless by name."""
    return sorted(key for key in hf if key not in known and not is_harmless(key))


def refused(hf: Json, keys: Collection[str], model_type: str) -> list[str]:
    """Returns the problems of unread `keys` that may change what is computed: one sentence for all that transformers doesn't read
    either, and one for each that it does."""
    if not keys:
        return []
    theirs = class_defaults(model_type, hf)
    unknown = {key: hf[key] for key in keys if key not in theirs and says_something(hf[key])}
    problems = [
        f"{key}={shown(hf[key])} can't be represented: it must be {shown(theirs[key])}, as in transformers where it is absent."
        for key in keys
        if key in theirs and not same(hf[key], theirs[key])
    ]
    if unknown:
        settings = [f"{shown(key)[1:-1]}={shown(value)}" for key, value in unknown.items()]
        more = f" and {len(settings) - _SHOWN} more" if len(settings) > _SHOWN else ""
        problems.append(
            f"{', '.join(settings[:_SHOWN])}{more} can't be represented: nothing reads such a key, and it may change what is "
            "computed; where it doesn't, name it in ignore_keys (in a run, model.ignore_keys)."
        )
    return problems


def says_something(value: object) -> bool:
    """Whether the value of an unknown key may turn something on."""
    return not (value is None or value is False or (isinstance(value, int | float | str | list | tuple | dict) and not value))


def class_defaults(model_type: str, hf: Json) -> dict[str, Any]:
    """Returns the defaults of transformers' config class for a model type; for aliases of a key, the value that `hf` has under that
    key. Empty if transformers has no such class. Imports transformers."""
    defaults, aliases = _declared(model_type)
    return {**defaults, **{key: hf.get(target, defaults.get(target)) for key, target in aliases.items()}}


@cache
def _declared(model_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}, {}
    config = CONFIG_MAPPING[model_type]
    return config().to_dict(), dict(config.attribute_map)
