"""Allowed values in adapter_config.json, the fields of PEFT's LoraConfig (peft 0.21: tuners/lora/config.py). Imports no torch.

Fields are of three kinds: supported ones, those that don't change what a trained adapter computes, and unsupported ones, which are
refused unless they are null, false or empty. So are fields of newer versions of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from megabridge.config import value_types
from megabridge.config.value_types import FLAG, OBJECT, Kind, list_of, number, one_of, shown, text, whole
from megabridge.peft.lora_config import HIGHEST, LARGEST_ALPHA

UNSET: Final = Kind(
    "null, false or empty", lambda value: value is None or value is False or (type(value) in (dict, list, str) and not value)
)
_UNCHANGED: Final = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the model's weights unchanged; pissa, olora, corda, lora_ga and loftq change them."""
_INITIALISATION: Final = Kind(
    f"true, false, {', '.join(_UNCHANGED)}: adapters with another initialisation belong to weights that PEFT changed for them, "
    "not to the model's own. Save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a plain one "
    "(not possible for loftq), or merge it with PEFT and name the merged model",
    lambda value: value is None or type(value) is bool or (type(value) is str and value.lower() in _UNCHANGED),
)
_NAMES: Final = list_of(text()).or_a(text()).or_null()
_TEXT: Final = text(4096).or_null()
_NOTE: Final = OBJECT.or_null()
_FLAG: Final = FLAG.or_null()

# fmt: off
FIELDS: Final[Mapping[str, Kind]] = {
    # supported
    "peft_type":               one_of("LORA"),
    "r":                       whole(1, HIGHEST).needed(),
    "lora_alpha":              number(-LARGEST_ALPHA, LARGEST_ALPHA).needed(),
    "lora_dropout":            number(0, math.nextafter(1, 0)).or_null(),
    "use_rslora":              _FLAG,
    "use_dora":                _FLAG,
    "target_modules":          _NAMES,
    "exclude_modules":         _NAMES,
    "target_parameters":       list_of(text()).or_null(),
    "init_lora_weights":       _INITIALISATION,
    # no effect on what a trained adapter computes: the tensors say which modules have one
    "task_type":               _TEXT,
    "auto_mapping":            _NOTE,
    "peft_version":            _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision":                _TEXT,
    "inference_mode":          _FLAG,
    "fan_in_fan_out":          _FLAG,  # PEFT sets it according to the layer
    "layers_to_transform":     whole(0, 16384).or_a(list_of(whole(0, 16384))).or_null(),
    "layers_pattern":          _NAMES,
    "megatron_core":           _TEXT,
    "loftq_config":            _NOTE,
    "eva_config":              _NOTE,
    "corda_config":            _NOTE,
    "lora_ga_config":          _NOTE,
    "velora_config":           _NOTE,  # how gradients are computed
    "qalora_group_size":       whole(1, 2**24).or_null(),
    "runtime_config":          _NOTE,
    # unsupported
    "bias":                    one_of("none").or_null(),
    "modules_to_save":         UNSET,
    "rank_pattern":            UNSET,
    "alpha_pattern":           UNSET,
    "lora_bias":               UNSET,
    "layer_replication":       UNSET,
    "megatron_config":         UNSET,
    "trainable_token_indices": UNSET,
    "alora_invocation_tokens": UNSET,
    "use_qalora":              UNSET,
    "use_bdlora":              UNSET,
    "arrow_config":            UNSET,
    "kasa_config":             UNSET,
    "monteclora_config":       UNSET,
    "ensure_weight_tying":     UNSET,
}
# fmt: on


def problems(content: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for every key of an adapter_config.json whose value is not supported."""
    if value_types.is_deep(content):
        return ["its objects and lists are nested too deeply"]
    found = [kind.problem(content, key, "it") for key, kind in FIELDS.items()]
    unknown = [(key, value) for key, value in content.items() if key not in FIELDS and not UNSET.allows(value)]
    found += [f"{shown(key)}: {shown(value)} is not supported; it may be {UNSET.says}." for key, value in unknown]
    return [problem for problem in found if problem is not None]
