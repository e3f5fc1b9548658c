"""Reads the files of the built-in tasks. Evaluation sets are small and must be complete: every bad row is an error."""

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
    """Returns the message of the ConfigError that `read` raises, or an empty list."""
    try:
        read()
    except ConfigError as error:
        return [str(error)]
    return []


def documents(path: str, column: str) -> list[str]:
    """Returns the documents of a .jsonl, or the text of any other file as one. Raises ConfigError with all bad lines."""
    if path.endswith(".jsonl"):
        return _rows(path, lambda row: _text(row, column))
    text = _decoded(_content(path), path)
    if not text:
        raise ConfigError(f"{path} must hold text, but it is empty; name another file.")
    return [text]


def questions(path: str) -> list[Question]:
    """Returns the questions of a .jsonl. Raises ConfigError with all bad lines."""
    return _rows(path, _question)


def prompts(path: str) -> list[str]:
    """Returns the prompts of a .jsonl, or the non-empty lines of any other file. Raises ConfigError with all bad lines."""
    if path.endswith(".jsonl"):
        return _rows(path, lambda row: _text(row, "prompt"))
    found = [line for line in _decoded(_content(path), path).split("\n") if line.strip()]
    if not found:
        raise ConfigError(f"{path} must hold one prompt per line, but it is empty; name another file.")
    return found


def _rows[T](path: str, read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    good: list[T] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ConfigError(f"must be a JSON object, not {type(row).__name__}")
            json.dumps(row, ensure_ascii=False).encode()  # tokenizers refuse lone surrogates
            good.append(read(row))
        except UnicodeDecodeError:
            problems.append(f"{path}:{number}: must be UTF-8")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: must be JSON: {error}")
        except ConfigError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise ConfigError(f"{len(problems)} rows of {path} can't be used; correct them:\n  {listed(problems)}")
    if not good:
        raise ConfigError(f"{path} must hold rows, but it has none; name another file.")
    return good


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields the non-blank lines with their numbers from 1. Only a line feed ends a line: JSON may hold other line breaks."""
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
        raise ConfigError(f"{path} must be UTF-8, but byte {error.start} is not; convert it.") from error


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key!r} must be a non-empty text, not {value!r}")
    return value


def _question(row: Mapping[str, Any]) -> Question:
    wrong: list[str] = []
    prompt = row.get("prompt", row.get("question"))
    if not isinstance(prompt, str):
        wrong.append(f"'prompt' (or 'question') must be a text, not {prompt!r}")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        wrong.append(f"'choices' must be a list of at least two non-empty texts, not {choices!r}")
        choices = []
    answer = row.get("answer")
    if type(answer) is not int or not (0 <= answer < len(choices) or (not choices and answer >= 0)):
        wrong.append(f"'answer' must be the index of the right choice, from 0, not {answer!r}")
    if wrong:
        raise ConfigError(", and ".join(wrong))
    return Question(str(prompt), tuple(choices), int(answer or 0))
