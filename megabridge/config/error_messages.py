"""Turns errors of Hydra and OmegaConf about a wrong config into one line with the key and the closest existing one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Final

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from megabridge.config import synonyms
from megabridge.config.schema import OPEN_NODES, Config
from megabridge.config.validation import nearest

_CLOSE: Final = 0.6
"""Similarity (difflib's ratio) from which a key is worth suggesting."""
_SHOWN: Final = 30
"""Number of keys of a node that are listed where none is similar."""


MOVED: Final = {
    "recipe.answer_prompt": "callbacks.answer.prompt",
    "conversion.logits_tokens": "callbacks.import_parity.logits_tokens and callbacks.hf_export.logits_tokens",
}
"""Former keys, and their current names."""


_AS_SETTING: Final = {
    "parallel": " Any other size: parallel.tp=... parallel.pp=...",
    "model": " Any other: model=auto model.path=<folder or hub id>.",
    "data": " Rows of your own: data=chat data.path=<file, folder or hub id>.",
}
"""What is given by a setting instead of a choice, by group."""


def explain(error: BaseException, conf: Path, others: Sequence[str] = ()) -> str:
    """Returns one line: what is wrong, and what to write instead. `conf` is the folder of config groups, `others` more keys."""
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, OverrideParseException):
        return f"can't read the override {error.override!r}: {_one_line(str(error.__cause__ or error))}"
    cause = _omegaconf_cause(error)
    text = str(error)
    override = re.match(r"Could not override '([^']+)'", text)
    if override is not None:
        # For a whole mapping, OmegaConf's error names the unknown key in it.
        inner = str(cause.full_key) if isinstance(cause, ConfigKeyError | ConfigAttributeError) else ""
        return _unknown_key(inner if inner.startswith(f"{override[1]}.") else override[1], conf, others)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return _unknown_key(str(cause.full_key), conf, others)
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} has no value; set it with {cause.full_key}=..."
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: {_one_line(str(cause))}"
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}: {_wrong_type(cause)}"
    if isinstance(cause, ConfigTypeError):
        return f"{cause.full_key}: {_one_line(str(cause))}; give it a value of its type."
    if isinstance(error, OSError):
        return _unusable(error)
    return _one_line(text)


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    """Returns the first of OmegaConf's own errors in the chain."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OmegaConfBaseException):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _one_line(text: str) -> str:
    """Returns the message without OmegaConf's trailer (full_key, object_type) and Hydra's search path."""
    kept = []
    for line in text.splitlines():
        if re.match(r"\s*(full_key|object_type|reference_type)[:=]|Config search path:", line):
            break
        if line.strip():
            kept.append(line.strip())
    return " ".join(kept)


def _unusable(error: OSError) -> str:
    """Returns the message for a file or folder that Hydra can't read or create."""
    place = f"{error.filename!r}: {error.strerror}"
    if str(error.filename).endswith(".yaml"):
        return f"a config must be a file that can be read, but {place}; correct it, or choose another."
    return f"a run's directory must be a folder that can be made, but {place}; set another run_dir (of a sweep, hydra.sweep.dir)."


def _missing_choice(error: MissingConfigException) -> str:
    """Returns the message for a group without the chosen file."""
    group, _, choice = str(error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
    options = sorted(error.options or [])
    if not group or not options:
        return _one_line(str(error))
    ours = synonyms.of_choice(group, choice)
    if ours in options:
        return f"{group}={choice} does not exist: it is {group}={ours} here."
    more = _AS_SETTING.get(group, "")
    return f"{group}={choice} does not exist{nearest(choice, options)} It is one of: {', '.join(options)}.{more}"


def _wrong_type(error: ValidationError) -> str:
    """Returns `'abc' must be a number.`, from OmegaConf's sentence."""
    match = re.match(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", str(error), re.DOTALL)
    if match is None:
        return _one_line(str(error))
    words = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "a text"}
    return f"{match[1]!r} must be {words.get(match[3], match[3])}."


def _unknown_key(key: str, conf: Path, others: Sequence[str]) -> str:
    """Returns the message for a key that the schema, or the chosen file of an open node, does not have."""
    if key in MOVED:
        return f"unknown key '{key}': it is {MOVED[key]} now; set that."
    if said := synonyms.of_key(key):
        return f"unknown key '{key}': {said}."
    parent = key.rpartition(".")[0]
    inside = next((f"{node}." for node in OPEN_NODES if key.startswith(f"{node}.")), "")
    known = [each for each in {*_known_keys(key, conf), *others} if each.startswith(inside)]
    # A node that contains the key exists, and can't be what was meant.
    candidates = sorted(each for each in known if not f"{key}.".startswith(f"{each}.")) or [""]
    best, name = max((_similarity(key, candidate), candidate) for candidate in candidates)
    beside = [each.rpartition(".")[2] for each in candidates if each.rpartition(".")[0] == parent]
    if best >= _CLOSE:
        hint = f"; did you mean '{name}'?"
    elif inside:
        hint = "."
    elif not parent or not beside:
        hint = f"; at the top there are {', '.join(each.name for each in fields(Config))}."
    else:
        hint = f"; in {parent} there are {', '.join(beside[:_SHOWN])}{', ...' if len(beside) > _SHOWN else ''}."
    if inside:
        hint += f" To add it, write +{key}=..."
    return f"unknown key '{key}'{hint}"


def _similarity(key: str, candidate: str) -> float:
    """Returns how similar two dotted keys are, as a whole or by their last words, where the rest is missing or wrong."""
    parent, _, last = key.rpartition(".")
    candidate_parent, _, candidate_last = candidate.rpartition(".")
    word = SequenceMatcher(None, last, candidate_last).ratio()
    return word if parent == candidate_parent else max(SequenceMatcher(None, key, candidate).ratio(), 0.9 * word)


def _known_keys(key: str, conf: Path) -> Iterator[str]:
    """Yields every key of the schema and, where `key` is in a group with open keys, those of that group's YAML files."""
    yield from _schema_keys(Config, "")
    group = key.partition(".")[0]
    if group in {node.partition(".")[0] for node in OPEN_NODES}:
        for file in sorted((conf / group).glob("*.yaml")):
            content = OmegaConf.load(file)
            if isinstance(content, DictConfig) and "@package _global_" not in file.read_text(encoding="utf-8").partition("\n")[0]:
                yield from _nested_keys(OmegaConf.to_container(content, resolve=False), group)


def _schema_keys(schema: type, prefix: str) -> Iterator[str]:
    for each in fields(schema):
        yield f"{prefix}{each.name}"
        made = each.default_factory() if callable(each.default_factory) else None
        if is_dataclass(made):
            yield from _schema_keys(type(made), f"{prefix}{each.name}.")


def _nested_keys(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}.{key}"
            yield from _nested_keys(value, f"{prefix}.{key}")
