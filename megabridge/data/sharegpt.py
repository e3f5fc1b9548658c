"""Conversations as ShareGPT has them, `from` and `value`, as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from megabridge.data.invalid_rows import FORMAT, ROLES, BadRow

CALL: Final = "function_call"
ROLES_BY_NAME: Final[Mapping[str, str]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    CALL: "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""Who speaks, by the names that such files have. A `function_call` is an assistant's message whose value is its JSON."""


def messages(turns: object, system: object = None) -> object:
    """The turns with role and content, after a row's own `system`, if any. Raises BadRow.

    What is no list of objects comes back as it is, for whoever checks messages.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    found = [_message(number, turn) for number, turn in enumerate(turns)]
    return found if system is None else [{"role": "system", "content": system}, *found]


def _message(number: int, turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn as a message; one that has a role already is one."""
    if "from" not in turn:
        return turn
    name, value = turn["from"], turn.get("value")
    if not isinstance(name, str) or name not in ROLES_BY_NAME:
        raise BadRow(ROLES, f"message {number} is from {str(name)[:40]!r}; known: {', '.join(ROLES_BY_NAME)}")
    if name != CALL:
        return {"role": ROLES_BY_NAME[name], "content": value}
    calls = parsed_json(f"value of message {number}, a {CALL},", value)
    listed = calls if isinstance(calls, list) else [calls]
    if not listed or not all(isinstance(call, dict) for call in listed):
        raise BadRow(FORMAT, f"value of message {number}, a {CALL}, must be an object, or a list of some")
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call} for call in listed]}


def parsed_json(what: str, text: object) -> Any:
    """What a field's JSON says. Raises BadRow."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise BadRow(FORMAT, f"{what} must be JSON: {error}") from error
