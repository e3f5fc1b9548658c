"""Assets of a Hugging Face folder: config, generation config, tokenizer, chat template. Copied byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from megabridge.errors import CheckpointError, ConfigError
from megabridge.families.core.unread_keys import TOKENS
from megabridge.hf.safetensors_format import parse_json
from megabridge.storage import regular_files
from megabridge.storage.inside_folder import inside

CONFIG: Final = "config.json"
ADAPTER: Final = "adapter_config.json"
"""PEFT's config, in a folder with adapters alone."""
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
GENERATION: Final = "generation_config.json"
# Name patterns of files that belong to a model. Code (*.py) and weights are never among them.
PATTERNS: Final = (
    GENERATION,
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
CODE: Final = ("*.py",)
"""Code in a model's folder: kept only if the user trusts it. Nothing here runs it."""
DTYPE_KEYS: Final = ("dtype", "torch_dtype")
_LARGEST: Final = 2**26


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a folder's config.json. Raises CheckpointError."""
    return read_object(folder / CONFIG, otherwise="name a folder with a Hugging Face model")


def read_object(path: Path, *, otherwise: str) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises CheckpointError, with the remedy `otherwise` if there is no such file."""
    return parse_object(read_file(path, otherwise=otherwise), str(path))


def read_file(path: Path, *, otherwise: str) -> bytes:
    """Reads a file `inside` its folder. Raises CheckpointError, with the remedy `otherwise` if there is no such file."""
    if not regular_files.exists(path):
        raise CheckpointError(f"{path.parent} must hold {path.name}; {otherwise}.")
    return regular_files.read(inside(path.parent, path.name), largest=_LARGEST)


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """Parses the content of the file `what` as a JSON object. Raises CheckpointError."""
    content = parse_json(text, what)
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must be a JSON object, not {type(content).__name__}; fetch it again.")
    return content


def end_tokens(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """Returns the end-of-text tokens: of generation_config.json if the folder has one, else of `config`, as in transformers.

    Raises CheckpointError for a file that can't be read, ConfigError for invalid tokens.
    """
    has_own = (folder / GENERATION).is_file()
    content = read_object(folder / GENERATION, otherwise="fetch it again") if has_own else config
    if (problem := TOKENS.problem(content, "eos_token_id")) is not None:
        raise ConfigError(f"{GENERATION if has_own else CONFIG}: {problem}")
    named = content.get("eos_token_id")
    return {named} if isinstance(named, int) else set(named or ())


def read_assets(source: Path, *, code: bool = False) -> dict[str, bytes]:
    """Reads tokenizer, templates, generation config, and with `code` *.py files; returns contents by path in the folder.

    Raises CheckpointError with all entries that are not files, or are links that lead out of the folder (see `inside`).
    """
    found, problems = dict[str, bytes](), list[str]()
    for name in sorted({name for pattern in ((*PATTERNS, *CODE) if code else PATTERNS) for name in _matching(source, pattern)}):
        try:
            found[name] = regular_files.read(inside(source, name))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n  ".join(problems))
    return found


def _matching(folder: Path, pattern: str) -> list[str]:
    """Paths in `folder` that match a pattern, without folders."""
    parent = pattern.rpartition("/")[0]
    place = folder / parent
    try:
        names = os.listdir(place) if regular_files.is_folder(place) else []  # noqa: PTH208
    except OSError as error:
        raise CheckpointError(f"{place} can't be read: {error.strerror}; allow it, or name another folder.") from error
    paths = [f"{parent}/{name}" if parent else name for name in names]
    return [path for path in paths if matches(path, pattern) and not regular_files.is_folder(folder / path)]


def matches(path: str, pattern: str) -> bool:
    """Like fnmatch, but `*` does not match `/`: original/ and onnx/ often hold a second copy of the weights."""
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)


def write_assets(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files that `read_assets` returned. One rank calls it."""
    for name, content in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)


def write_config(target: Path, config: Mapping[str, Any], *, source: bytes | None, dtype: str | None) -> None:
    """Writes config.json: the bytes of `source` if nothing changes.

    `dtype` is the exported dtype's name ("float32"); it replaces another one in config.json.
    """
    edited = dict(config)
    for key in DTYPE_KEYS:
        if dtype is not None and key in edited:
            edited[key] = dtype
    if source is not None and edited == parse_object(source, CONFIG):
        (target / CONFIG).write_bytes(source)
        return
    if dtype is not None and not any(key in edited for key in DTYPE_KEYS):
        edited["dtype"] = dtype
    (target / CONFIG).write_text(json.dumps(edited, indent=2, ensure_ascii=False) + "\n")
