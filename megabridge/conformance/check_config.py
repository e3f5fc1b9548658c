"""Checks a family's config fields: every key of a config.json must survive the conversion to native settings and back."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

from megabridge.conformance.findings import Finding, failed
from megabridge.conformance.tiny_model import quiet
from megabridge.errors import MegabridgeError
from megabridge.families import Family
from megabridge.families.core.fields import Json
from megabridge.families.core.unread_keys import is_harmless

# Keys that transformers' config classes add for their own use and that don't describe the model.
_BOOKKEEPING: Final = ("rope_scaling",)


def check_config(family: Family, hf: Json, where: str, *, ignore: Collection[str] = ()) -> Finding:
    """Checks that `hf` converts to native settings and back with the same meaning, except for the keys in `ignore`.

    Needs no process groups.
    """
    try:
        native = family.native(hf, ignore=ignore)
        back = family.hf(native)
        again = family.native(back)
    except MegabridgeError as error:
        return failed(where, "config", error)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return failed(where, "config", error)
    problems = [f"{name}={value!r} comes back as {again.get(name)!r}" for name, value in native.items() if again.get(name) != value]
    hf = {key: value for key, value in hf.items() if key not in ignore}
    problems += [*_lost_keys(family, hf, back), *_other_defaults(family, hf, native)]
    return Finding(where, "config", f"{len(hf)} keys", tuple(problems))


def _lost_keys(family: Family, hf: Json, back: Json) -> list[str]:
    """Returns a line for each key of transformers' config class that no field reads and that isn't at its default."""
    theirs, ours, default = _meaning(hf), _meaning(back), _meaning({"model_type": hf.get("model_type")})
    if theirs is None or ours is None or default is None:
        return []
    known = family.keys.union(_BOOKKEEPING)
    return [
        f"no field reads {key}={value!r}; transformers takes {default[key]!r} where it is absent"
        for key, value in theirs.items()
        if key not in known and not is_harmless(key) and key in default and ours.get(key) != value
    ]


def _other_defaults(family: Family, hf: Json, native: Json) -> list[str]:
    """Returns a line for each setting that changes when the keys that `hf` lacks are filled in with transformers' defaults."""
    theirs = _meaning(hf)
    if theirs is None:
        return []
    try:
        filled = family.native({**theirs, "architectures": [family.architecture]})
    except (MegabridgeError, KeyError, TypeError, ValueError) as error:
        return [f"with the defaults of transformers' config class filled in: {error}"]
    return [
        f"{name}={native.get(name)!r} follows from config.json, but {value!r} from the same with transformers' defaults filled in"
        for name, value in filled.items()
        if native.get(name) != value
    ]


def _meaning(hf: Json) -> dict[str, Any] | None:
    """Returns all settings as transformers' config class understands a config.json; None if there is no such class."""
    from transformers import AutoConfig

    quiet()
    content = {key: value for key, value in json.loads(json.dumps(dict(hf))).items() if key != "transformers_version"}
    try:
        meaning: dict[str, Any] = json.loads(json.dumps(AutoConfig.for_model(**content).to_dict()))
    except Exception:  # an unknown model_type, or a config class that refuses it: building the tiny model shows which
        return None
    return meaning
