"""The files of the built-in tasks. Evaluated sets are small and meant to be whole: every bad row is an error, with its line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.storage import regular_files


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right choice."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def problems_of(read: Callable[[], object]) -> list[str]:
    """The message of the ConfigError that `read` raises, or nothing."""
    try:
        read()
    except ConfigError as error:
        return [str(error)]
    return []


def documents(path: str, column: str) -> list[str]:
    """The documents of a .jsonl, or the text of any other file as one. Raises ConfigError, with all bad lines."""
    if path.endswith(".jsonl"):
        return _rows(path, lambda row: _text(row, column))
    text = _decoded(_content(path), path)
    if not text:
        raise ConfigError(f"{path} must hold text, and it is empty; name another file.")
    return [text]


def questions(path: str) -> list[Question]:
    """The rows of a .jsonl. Raises ConfigError, with all bad lines."""
    return _rows(path, _question)


def prompts(path: str) -> list[str]:
    """The prompts of a .jsonl, or the lines of any other file that are not empty. Raises ConfigError, with all bad lines."""
    if path.endswith(".jsonl"):
        return _rows(path, lambda row: _text(row, "prompt"))
    found = [line for line in _decoded(_content(path), path).split("\n") if line.strip()]
    if not found:
        raise ConfigError(f"{path} must hold a prompt a line, and it is empty; name another file.")
    return found


def _rows[T](path: str, read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    good: list[T] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ConfigError(f"must be a JSON object, not {type(row).__name__}")
            json.dumps(row, ensure_ascii=False).encode()  # a tokenizer takes no lone surrogates
            good.append(read(row))
        except UnicodeDecodeError:
            problems.append(f"{path}:{number}: must be UTF-8")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: must be JSON: {error}")
        except ConfigError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise ConfigError(f"{len(problems)} rows of {path} can't be used; mend them:\n  {listed(problems)}")
    if not good:
        raise ConfigError(f"{path} must hold rows, and it has none; name another file.")
    return good


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1. Only a line feed ends one: JSON may hold other line breaks."""
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if line.strip():
            yield number, line


def _content(path: str) -> bytes:
    try:
        with regular_files.opened(Path(path)) as file:
            return file.read()
    except CheckpointError as error:
        raise ConfigError(f"path={error}") from error


def _decoded(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8, and byte {error.start} is not; convert it.") from error


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key!r} must be a text that is not empty, not {value!r}")
    return value


def _question(row: Mapping[str, Any]) -> Question:
    wrong: list[str] = []
    prompt = row.get("prompt", row.get("question"))
    if not isinstance(prompt, str):
        wrong.append(f"'prompt' (or 'question') must be a text, not {prompt!r}")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        wrong.append(f"'choices' must be a list of at least two texts that are not empty, not {choices!r}")
        choices = []
    answer = row.get("answer")
    if type(answer) is not int or not (0 <= answer < len(choices) or (not choices and answer >= 0)):
        wrong.append(f"'answer' must be the index of the right choice, from 0, not {answer!r}")
    if wrong:
        raise ConfigError(", and ".join(wrong))
    return Question(str(prompt), tuple(choices), int(answer or 0))
