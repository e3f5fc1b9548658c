"""Loads the tokenizer of a Hugging Face folder, and encodes plain text with it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

# Takes more than a second to import: done at the top, so that ranks forked by one process share it.
from transformers import AutoTokenizer

from megabridge.data.batches import Sample
from megabridge.errors import CheckpointError, ConfigError, said
from megabridge.storage import regular_files

_SUFFIXES: Final = (".json", ".model", ".txt", ".jinja", ".tiktoken")


def _check_file(file: Path) -> None:
    """Raises CheckpointError for a file that can't be read, or is larger than any tokenizer's."""
    with regular_files.opened(file) as opened:
        size = os.fstat(opened.fileno()).st_size
    if size > regular_files.LARGEST:
        raise CheckpointError(f"{file} has {size} bytes, and may have {regular_files.LARGEST}; fetch it again.")


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a folder without running its code. Raises CheckpointError where transformers can't load it."""
    with suppress(OSError):  # transformers reports what is wrong with a folder
        for file in sorted(folder.iterdir()):
            if file.exists() and not file.is_dir() and (file.suffix in _SUFFIXES or not regular_files.exists(file)):
                _check_file(file)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the package tokenizers aren't Exceptions
        reason = said(error).splitlines()[0].rstrip(" .:")
        raise CheckpointError(
            f"the tokenizer in {folder} must be one that transformers loads, but: {reason}; fetch its files again, or replace "
            "them by another's."
        ) from error


def pad_token(tokenizer: Any, vocab_size: int | None = None) -> int:
    """Returns the id that rows are padded with; as a label it has no loss.

    With `vocab_size` the id is below it: some tokenizers have a padding token for which their model has no row.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (vocab_size is None or 0 <= token < vocab_size):
            return int(token)
    return 0


class TextEncoder:
    """Encodes documents and pairs of plain text, with the tokenizer's tokens before them and its end-of-text token after them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = load_tokenizer(folder)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer in {folder} must have an end-of-text token (eos_token), which closes a document; set one."
            )

    @property
    def pad_token(self) -> int:
        """See `pad_token`."""
        return pad_token(self.tokenizer)

    def document(self, text: str) -> list[int]:
        """Returns the tokens of a whole document, with the end-of-text token."""
        return self._ended(list(self.tokenizer(text)["input_ids"]))

    def encode(self, text: str) -> Sample:
        """Returns a document as a sample with all tokens learned."""
        tokens = self.document(text)
        return Sample(tokens, [True] * len(tokens))

    def pair(self, prompt: str, completion: str) -> Sample:
        """Returns a prompt and its completion as a sample, with only the completion learned.

        The two are tokenised separately, as in generation: no token crosses the boundary.
        """
        before = list(self.tokenizer(prompt)["input_ids"])
        while before and before[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text
            before.pop()
        after = self._ended(list(self.tokenizer(completion, add_special_tokens=False)["input_ids"]))
        return Sample(before + after, [False] * len(before) + [True] * len(after))

    def _ended(self, tokens: list[int]) -> list[int]:
        end: int = self.tokenizer.eos_token_id
        return tokens if tokens and tokens[-1] == end else [*tokens, end]
