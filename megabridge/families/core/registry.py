"""Registry of families by architecture: ours, and those of installed packages (entry points `megabridge.families`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final

from megabridge.config import instantiate
from megabridge.config.value_types import shown
from megabridge.errors import ConfigError, listed
from megabridge.families.core.family import Family
from megabridge.families.core.fields import Json
from megabridge.families.core.unread_keys import COMMON

_OURS = (
    "arcee", "cohere", "deepseek", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "gemma", "gemma3", "glm",
    "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_neox", "gpt_oss", "granite", "granite_moe", "hunyuan", "hunyuan_moe", "llama",
    "llama4", "minimax_m2", "mistral", "mixtral", "nemotron", "olmo", "olmoe", "phi3", "phimoe", "qwen", "qwen_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
_SUFFIX: Final = re.compile(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel|Model)$")
_registered: dict[str, Family] = {}


@cache
def own_families() -> dict[str, Family]:
    """Returns our families by Hugging Face class name, without importing other packages."""
    found: dict[str, Family] = {}
    for name in _OURS:
        names = vars(import_module(f"megabridge.families.{name}"))
        found |= {family.architecture: family for family in names.get("FAMILIES") or (names["FAMILY"],)}
    return found


@cache
def _installed() -> dict[str, Family]:
    found = dict(own_families())
    for point in entry_points(group="megabridge.families"):
        family = point.load()
        if not isinstance(family, Family):
            raise ConfigError(f"entry point {point.value!r} must name a megabridge.families.Family, not {type(family).__name__}.")
        found[family.architecture] = family
    return found


def register(family: Family) -> None:
    """Adds or replaces a family in this process."""
    _registered[family.architecture] = family


def register_named(target: str) -> Family:
    """Registers the family at `target`, module:NAME, and returns it. Raises ConfigError if there is none."""
    family = instantiate.named(target, where="family")
    if not isinstance(family, Family):
        raise ConfigError(f"family={target!r} must name a megabridge.families.Family, not {type(family).__name__}.")
    register(family)
    return family


def all_families() -> dict[str, Family]:
    """Returns all known families by Hugging Face class name."""
    return {**_installed(), **_registered}


def architecture_of(hf: Json, *, among: Mapping[str, Family] | None = None) -> str:
    """Returns transformers' class name for a config.json, or the one that its model_type implies, of all families or `among`.

    Raises ConfigError if there is neither.
    """
    if problems := [problem for key in ("architectures", "model_type") if (problem := COMMON[key].problem(hf, key)) is not None]:
        raise ConfigError(listed(problems))
    families = all_families() if among is None else among
    named = hf.get("architectures") or []
    if named:
        owners = [family.architecture for family in families.values() if named[0] in family.other_names]
        return owners[0] if owners else str(named[0])
    for family in families.values():
        if family.model_type == hf.get("model_type"):
            return family.architecture
    raise ConfigError(
        f"config.json must name an architecture; it has architectures={shown(hf.get('architectures'))} and "
        f"model_type={shown(hf.get('model_type'))}, which no family knows; {_list(families)}"
    )


def family_for(hf: Json, *, among: Mapping[str, Family] | None = None) -> Family:
    """Returns the family of a config.json, of all or `among`. Raises ConfigError with near matches if there is none."""
    known = all_families() if among is None else among
    architecture, kind = architecture_of(hf, among=known), hf.get("model_type")
    others = [name for name, family in known.items() if family.model_type == kind and name != architecture]
    if architecture in known and others and known[architecture].model_type != kind:
        raise ConfigError(
            f"architectures={shown(hf['architectures'])} and model_type={kind!r}, which is that of {others[0]}, contradict each "
            "other; transformers goes by model_type: correct one of them."
        )
    if architecture in known:
        return known[architecture]
    near = _near(architecture, kind, known)
    hint = f"did you mean {' or '.join(near)}?" if near else _list(known)
    raise ConfigError(
        f"architecture {shown(architecture)} is not supported; {hint} To add one, write a Family and name it in the entry-point "
        "group 'megabridge.families' (docs/adding-a-family.md)."
    )


def _near(architecture: str, kind: object, known: Mapping[str, Family]) -> list[str]:
    """The families that may be meant: of that model_type, or with a name that is nearly the same without what all names have."""
    stems = {_SUFFIX.sub("", name).lower(): name for name in known}
    alike = [stems[stem] for stem in get_close_matches(_SUFFIX.sub("", architecture).lower(), stems, n=3, cutoff=0.75)]
    misspelt = get_close_matches(architecture, known, n=1, cutoff=0.9)
    return list(dict.fromkeys([*(name for name, family in known.items() if family.model_type == kind), *misspelt, *alike]))


def _list(known: Mapping[str, Family]) -> str:
    return f"{len(known)} are: docs/models.md and AutoBridge.list_supported_models() name them."
