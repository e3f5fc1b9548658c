"""Encodes chat messages as tokens, with a mask of what the assistant says and nothing else.

Where the template marks the assistant's text itself, by `{% generation %}`, that mark is used. Most templates don't. Then the
conversation is rendered up to the start and up to the end of each assistant message; the span between the two must be exactly that
message and its end-of-turn token, and must begin and end between tokens, as in generation. A message whose span can't be found
exactly is an error: the loss never covers other text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megabridge.data.batches import Sample
from megabridge.data.rendering import Template
from megabridge.data.text import load_tokenizer, pad_token
from megabridge.errors import ConfigError

type Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; templates may use more keys. An assistant's message with
"tool_calls" may have no text."""

# The tag as transformers looks for it (utils/chat_template_utils.py).
_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Arguments of transformers' apply_chat_template other than template variables, and variables that it sets itself.
_RESERVED: Final = frozenset((
    "self", "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
))  # fmt: skip
_REMEDY: Final = "mark the assistant's text in the chat template with {% generation %}"


class ChatEncoder:
    """Encodes conversations with the tokenizer and the chat template of a Hugging Face folder.

    The end-of-turn token counts as said by the assistant; a line break after it, which the template writes and a model never
    produces, does not.
    """

    def __init__(self, folder: Path, *, template_arguments: Mapping[str, object] | None = None) -> None:
        """`template_arguments` are passed to the template, e.g. a fixed date_string where it would write today's date.

        Raises ConfigError for reserved names, and where the tokenizer has no chat template.
        """
        self.tokenizer: Any = load_tokenizer(folder)
        self._folder = folder
        self._arguments = dict(template_arguments or {})
        if reserved := sorted(self._arguments.keys() & _RESERVED):
            raise ConfigError(
                f"template_arguments={reserved} must be variables of the chat template, but these control how it is rendered; "
                "remove them (a different template belongs in the model's folder)."
            )
        self._template = Template(self.tokenizer, folder)
        self._has_tag = bool(_TAG.search(self._template.source))
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special.update(self.tokenizer.all_special_tokens)
        alternatives = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)"
        self._ended = re.compile(rf"(?:{alternatives})\Z")
        self._tail = re.compile(rf"((?:\s*(?:{alternatives}))*)\s*")

    @property
    def pad_token(self) -> int:
        """The id that rows are padded with; as a label it has no loss."""
        return pad_token(self.tokenizer)

    def encode(self, messages: Sequence[Message]) -> Sample:
        """Encodes the whole conversation.

        Raises ConfigError when the assistant's tokens can't be found exactly, and the errors of `Template.apply`.
        """
        if self._has_tag:
            return self._by_tag(messages)
        text = self._render(messages)
        tokens = self._tokens(text)
        mask = [False] * len(tokens)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begin, end = self._span(text, messages, number)
                first, last = (self._boundary(text, tokens, place, number) for place in (begin, end))
                mask[first:last] = [True] * (last - first)
        return Sample(tokens, mask)

    def _by_tag(self, messages: Sequence[Message]) -> Sample:
        encoded = self._template.apply(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self._arguments
        )
        sample = Sample(list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]])
        if not any(sample.mask) and any(message["role"] == "assistant" for message in messages):
            raise ConfigError(
                f"the chat template of {self._folder} has {{% generation %}}, but no token of this conversation is within it; "
                "put it around the assistant's text."
            )
        return sample

    def _span(self, text: str, messages: Sequence[Message], number: int) -> tuple[int, int]:
        """Returns (begin, end) in characters of what assistant message `number` adds to `text`, with its end-of-turn token."""
        before = self._render(messages[:number], prompt=True) if number else ""
        through = self._render(messages[: number + 1])
        if not number or not text.startswith(through) or not through.startswith(before):
            why = "changes when more follows, or does not follow its prompt" if number else "has no prompt before it"
            raise ConfigError(
                f"with the chat template of {self._folder}, message {number} {why}: its tokens can't be told apart; {_REMEDY}."
            )
        added = through[len(before) :]
        if messages[number].get("tool_calls"):
            return len(before), len(before) + self._end_of_calls(added, number)
        content = message_text(messages[number], number)
        lead = len(added) - len(added.lstrip())
        # Templates may trim the text, and may begin it with a space.
        if added.startswith(content):
            end = len(content)
        elif added[lead:].startswith(content.strip()):
            end = lead + len(content.strip())
        else:
            raise ConfigError(f"the chat template of {self._folder} changes the text of assistant message {number}; {_REMEDY}.")
        tail = self._tail.fullmatch(added, end)
        if tail is None:
            raise ConfigError(
                f"the chat template of {self._folder} writes {added[end : end + 40]!r} after assistant message {number}, where "
                f"only an end-of-turn token may follow; {_REMEDY}."
            )
        return len(before), len(before) + tail.end(1)

    def _end_of_calls(self, added: str, number: int) -> int:
        """Returns where the end-of-turn token of `added`, an answer that calls tools in the template's own format, ends."""
        end = len(added.rstrip())
        if not self._ended.search(added[:end]):
            raise ConfigError(
                f"the chat template of {self._folder} must close assistant message {number}, which calls tools, by an end-of-turn "
                f"token, but writes {added[-40:]!r}; {_REMEDY}."
            )
        return end

    def _boundary(self, text: str, tokens: list[int], place: int, number: int) -> int:
        """Returns the number of tokens in `text[:place]`. They must be the first of `tokens`: none may cross the boundary."""
        before = self._tokens(text[:place])
        if tokens[: len(before)] != before:
            around = f"{text[max(0, place - 10) : place]!r} | {text[place : place + 10]!r}"
            raise ConfigError(
                f"with the chat template of {self._folder}, a token crosses the boundary {around} of message {number}; "
                f"strip white space at the ends of the text, or {_REMEDY}."
            )
        return len(before)

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        text: str = self._template.apply(messages, tokenize=False, add_generation_prompt=prompt, **self._arguments)
        return text

    def _tokens(self, text: str) -> list[int]:
        # The template has written every special token that belongs there.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def message_text(message: Message, number: int) -> str:
    """Returns the message's content. Raises ConfigError where it is not text."""
    content = message.get("content")
    if not isinstance(content, str):
        raise ConfigError(f"message {number} must have its content as text, not {type(content).__name__}; {_REMEDY}.")
    return content
