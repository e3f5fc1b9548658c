"""What the keys of an adapter_config.json may say: the fields of PEFT's LoraConfig (peft 0.21: tuners/lora/config.py). No torch.

Every field is told apart here: what adapters do as it says, what changes nothing that a trained adapter computes, and what adapters
here don't do, which is refused unless it is null, false or empty. So is every field that PEFT may come to have.
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
"""Ways to begin an adapter that leave the weights beside it as they were; pissa, olora, corda, lora_ga and loftq change them."""
_BEGUN: Final = Kind(
    f"true, false, {', '.join(_UNCHANGED)}: adapters that began otherwise are right beside the weights that PEFT changed for them, "
    "and not beside the model's own. Save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain "
    "one of it (of loftq's it can't), or merge it with PEFT and name the merged model",
    lambda value: value is None or type(value) is bool or (type(value) is str and value.lower() in _UNCHANGED),
)
_NAMES: Final = list_of(text()).or_a(text()).or_null()
_TEXT: Final = text(4096).or_null()
_NOTE: Final = OBJECT.or_null()
_FLAG: Final = FLAG.or_null()

# fmt: off
FIELDS: Final[Mapping[str, Kind]] = {
    # done as they say
    "peft_type":               one_of("LORA"),
    "r":                       whole(1, HIGHEST).needed(),
    "lora_alpha":              number(-LARGEST_ALPHA, LARGEST_ALPHA).needed(),
    "lora_dropout":            number(0, math.nextafter(1, 0)).or_null(),
    "use_rslora":              _FLAG,
    "use_dora":                _FLAG,
    "target_modules":          _NAMES,
    "exclude_modules":         _NAMES,
    "target_parameters":       list_of(text()).or_null(),
    "init_lora_weights":       _BEGUN,
    # nothing that a trained adapter computes depends on them: which modules have one, the tensors say
    "task_type":               _TEXT,
    "auto_mapping":            _NOTE,
    "peft_version":            _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision":                _TEXT,
    "inference_mode":          _FLAG,
    "fan_in_fan_out":          _FLAG,  # PEFT itself sets it as the layer is
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
    # not done here
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
    """A sentence for every key of an adapter_config.json that adapters here can't do as it says."""
    if value_types.is_deep(content):
        return ["its objects and lists stand in each other too deeply"]
    found = [kind.problem(content, key, "it") for key, kind in FIELDS.items()]
    unknown = [(key, value) for key, value in content.items() if key not in FIELDS and not UNSET.allows(value)]
    found += [f"{shown(key)}: {shown(value)} is known to no adapter here; it may be {UNSET.says}." for key, value in unknown]
    return [problem for problem in found if problem is not None]
