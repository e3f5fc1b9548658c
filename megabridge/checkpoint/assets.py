"""What a Hugging Face folder holds besides weights: config, generation config, tokenizer, chat template. Copied byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megabridge import regular
from megabridge.checkpoint.safetensors import parse_json
from megabridge.errors import CheckpointError, ConfigError
from megabridge.families.unread import TOKENS

CONFIG: Final = "config.json"
ADAPTER: Final = "adapter_config.json"
"""PEFT's, of a folder with adapters alone."""
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
"""Code that came with a model: kept beside the rest only where the user trusts it. Nothing here runs it."""
DTYPE_KEYS: Final = ("dtype", "torch_dtype")
_LARGEST: Final = 2**26


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json. Raises CheckpointError."""
    return read_object(folder / CONFIG, otherwise="name a folder with a Hugging Face model")


def read_object(path: Path, *, otherwise: str) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError, with what to do `otherwise` where there is no such file."""
    return parse_object(read_file(path, otherwise=otherwise), str(path))


def read_file(path: Path, *, otherwise: str) -> bytes:
    """The content of a file. Raises CheckpointError, with what to do `otherwise` where there is no such file."""
    if not regular.exists(path):
        raise CheckpointError(f"{path.parent} must hold {path.name}; {otherwise}.")
    return regular.read(path, largest=_LARGEST)


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in the content of the file `what`. Raises CheckpointError."""
    content = parse_json(text, what)
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must be a JSON object, not {type(content).__name__}; fetch it again.")
    return content


def end_tokens(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """The tokens that end a text: generation_config.json's where the folder has one, else the config's, as in transformers.

    Raises CheckpointError for a file that can't be read, ConfigError for tokens that are none.
    """
    has_own = (folder / GENERATION).is_file()
    content = read_object(folder / GENERATION, otherwise="fetch it again") if has_own else config
    if (problem := TOKENS.problem(content, "eos_token_id")) is not None:
        raise ConfigError(f"{GENERATION if has_own else CONFIG}: {problem}")
    named = content.get("eos_token_id")
    return {named} if isinstance(named, int) else set(named or ())


def read_assets(source: Path, *, code: bool = False) -> dict[str, bytes]:
    """Tokenizer, templates, generation config, and `code`, following links: their content by path in the folder."""
    patterns = (*PATTERNS, *CODE) if code else PATTERNS
    names = sorted({str(path.relative_to(source)) for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    return {name: regular.read(source / name) for name in names}


def write_assets(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes what `read_assets` read. One rank calls it."""
    for name, content in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)


def write_config(target: Path, config: Mapping[str, Any], *, source: bytes | None, dtype: str | None) -> None:
    """Writes config.json. Byte for byte the source's, its content, where nothing changes.

    `dtype` is the exported dtype's name ("float32"); where config.json states another, that key is set.
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
