"""Encodes rows of fine-tuning data by their schema, as tokens and mask. An unusable row raises a BadRow with its kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from megabridge.config.validation import nearest
from megabridge.data.batches import Sample
from megabridge.data.chat import ChatEncoder
from megabridge.data.invalid_rows import CONTENT, EMPTY, ENCODING, FORMAT, INEXACT, MISSING, REFUSED, ROLES, BadRow
from megabridge.data.rendering import Refused, TemplateError
from megabridge.data.text import TextEncoder, pad_token
from megabridge.errors import ConfigError

FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields of each schema."""
SCHEMAS: Final = ("auto", *FIELDS)
DIGEST: Final = 16
"""Bytes of a row's digest."""
_SYSTEM: Final = ("system", "developer")
# Roles that may precede a message of each role; None is the beginning. System messages don't count.
_BEFORE: Final[Mapping[str, tuple[str | None, ...]]] = {
    "user": (None, "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Examples:
    """Makes samples of rows of one schema; `schema` is "auto" until the first row determines it."""

    def __init__(
        self,
        folder: Path,
        *,
        schema: str,
        columns: Mapping[str, str],
        prompt_as_chat: bool,
        template_arguments: Mapping[str, object] | None,
        vocab_size: int | None,
    ) -> None:
        """`columns` maps fields to the columns that hold them: {"prompt": "question"}; `vocab_size`: see `DataModule`.

        Raises ConfigError for an unknown field or schema.
        """
        known = sorted({field for fields in FIELDS.values() for field in fields})
        for field in columns:
            if field not in known:
                raise ConfigError(f"data.columns.{field} must be one of {', '.join(known)}{nearest(field, known)}")
            if not isinstance(columns[field], str):
                raise ConfigError(f"data.columns.{field}={columns[field]!r} must be the name of a column, as text.")
        if schema not in SCHEMAS:
            raise ConfigError(f"data.schema={schema!r} must be one of {', '.join(SCHEMAS)}{nearest(schema, list(SCHEMAS))}")
        self.schema = schema
        self._folder, self._columns = folder, columns
        self._prompt_as_chat, self._arguments = prompt_as_chat, template_arguments
        self.vocab_size = vocab_size
        self._chat: ChatEncoder | None = None
        self._text: TextEncoder | None = None

    @property
    def pad_token(self) -> int:
        """The id that rows are padded with; known after the first row."""
        is_chat = self.schema == "messages" or (self.schema == "prompt_completion" and self._prompt_as_chat)
        return pad_token((self.chat if is_chat else self.text).tokenizer, self.vocab_size)

    @property
    def text(self) -> TextEncoder:
        """The encoder of texts, created when needed: chats don't need an end-of-text token."""
        if self._text is None:
            self._text = TextEncoder(self._folder)
        return self._text

    @property
    def chat(self) -> ChatEncoder:
        """The encoder of chats, created when needed: texts don't need a chat template."""
        if self._chat is None:
            self._chat = ChatEncoder(self._folder, template_arguments=self._arguments)
        return self._chat

    def encode(self, row: Mapping[str, Any]) -> Sample:
        """Encodes one row. Raises BadRow, and ConfigError where the tokenizer lacks what the schema needs."""
        if self.schema == "auto":
            self.schema = self._recognised(row)
        values = self._values(row)
        if self.schema == "text":
            return self.text.encode(_text("text", values[0]))
        if self.schema == "messages":
            return self._conversation(_messages(values[0]))
        prompt, completion = (_text(field, value) for field, value in zip(FIELDS[self.schema], values, strict=True))
        if self._prompt_as_chat:
            return self._conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
        return self.text.pair(prompt, completion)

    def settle(self, row: Mapping[str, Any] | BadRow) -> None:
        """Determines the schema from a row that another rank encodes, if it is still "auto"."""
        if self.schema == "auto" and not isinstance(row, BadRow):
            with suppress(BadRow):
                self.schema = self._recognised(row)

    def digest(self, row: Mapping[str, Any]) -> bytes:
        """Returns the digest of the row's fields, DIGEST bytes; equal for equal content, whatever its place."""
        content = json.dumps(self._values(row), sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).digest()[:DIGEST]

    def _recognised(self, row: Mapping[str, Any]) -> str:
        for schema, fields in FIELDS.items():
            if all(self._columns.get(field, field) in row for field in fields):
                return schema
        wanted = "; ".join(" and ".join(self._columns.get(field, field) for field in fields) for fields in FIELDS.values())
        raise BadRow(MISSING, f"the row has {', '.join(row) or 'nothing'}, and none of: {wanted}")

    def _values(self, row: Mapping[str, Any]) -> list[Any]:
        names = [self._columns.get(field, field) for field in FIELDS[self.schema]]
        lacking = [name for name in names if row.get(name) is None]
        if lacking:
            raise BadRow(MISSING, f"{' and '.join(lacking)}; the row has {', '.join(row) or 'nothing'}")
        return [row[name] for name in names]

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> Sample:
        chat = self.chat
        try:
            return chat.encode(messages)
        except TemplateError as error:  # the template's fault, not the row's
            raise ConfigError(str(error)) from error
        except ConfigError as error:
            raise BadRow(REFUSED if isinstance(error, Refused) else INEXACT, str(error)) from error


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRow(FORMAT, f"{field} must be text, not {type(value).__name__}")
    if not value.strip():
        raise BadRow(EMPTY, f"{field} has no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(ENCODING, f"{field}: {error}") from error
    return value


def _messages(value: object) -> list[Mapping[str, Any]]:
    """Returns the messages of a conversation, after checking the order of roles and that it ends with an answer."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow(FORMAT, "messages must be a list of objects")
    if not value:
        raise BadRow(EMPTY, "messages has none")
    _check_encoding(value)
    before: str | None = None
    messages = []
    for number, message in enumerate(value):
        role = message.get("role")
        if role is None:
            raise BadRow(MISSING, f"role of message {number}")
        if not isinstance(role, str):
            raise BadRow(FORMAT, f"role of message {number} must be text, not {type(role).__name__}")
        if role in _SYSTEM and before is None:
            pass
        elif role not in _BEFORE:
            known = ", ".join((*_SYSTEM, *_BEFORE))
            raise BadRow(
                ROLES, f"message {number} is by {role!r}; " + (f"{role} comes first" if role in _SYSTEM else f"known: {known}")
            )
        elif before not in _BEFORE[role]:
            raise BadRow(ROLES, f"message {number} is by {role} after {before or 'nothing'}")
        else:
            before = role
        messages.append(_message(number, message))
    if before != "assistant":
        raise BadRow(ROLES, f"the last message is by {value[-1]['role']}, not by the assistant")
    return messages


def _message(number: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the message with its content as text, without keys that are null (columns of a table, in this row)."""
    content, calls, where = message.get("content"), message.get("tool_calls"), f"of message {number}"
    given = {key: value for key, value in message.items() if value is not None}
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadRow(FORMAT, f"tool_calls {where} must be a list of objects")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    is_call = bool(calls) and message["role"] == "assistant"
    if content is None and not is_call:
        raise BadRow(MISSING, f"content {where}")
    if not (is_call and (content is None or content == "")):
        _text(f"content {where}", content)
    return given | {"content": content}


def _part(part: object, where: str) -> str:
    """Returns the text of one part of a content that is a list of parts."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRow(CONTENT, f"content {where} has a part that is no text: {str(kind)[:40]}")
    return str(part["text"])


def _check_encoding(value: object) -> None:
    """Raises BadRow where a text anywhere in `value` can't be encoded, or lists and objects are nested too deeply."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(ENCODING, f"messages: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(FORMAT, f"messages: {error}") from error
