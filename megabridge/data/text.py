"""Plain text to tokens, and the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

# More than a second to import: here, so that ranks forked by one process share it.
from transformers import AutoTokenizer

from megabridge.data.batches import Sample
from megabridge.errors import CheckpointError, ConfigError, said
from megabridge.storage import regular_files

_SUFFIXES: Final = (".json", ".model", ".txt", ".jinja", ".tiktoken")


def _check_file(file: Path) -> None:
    """Raises CheckpointError for a file that can't be read at all, or is larger than any tokenizer's."""
    with regular_files.opened(file) as opened:
        size = os.fstat(opened.fileno()).st_size
    if size > regular_files.LARGEST:
        raise CheckpointError(f"{file} has {size} bytes, and may have {regular_files.LARGEST}; fetch it again.")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; no code of the folder is run. Raises CheckpointError where transformers can't load it."""
    with suppress(OSError):  # transformers says what is wrong with a folder
        for file in sorted(folder.iterdir()):
            if file.exists() and not file.is_dir() and (file.suffix in _SUFFIXES or not regular_files.exists(file)):
                _check_file(file)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' own failures are no Exceptions
        reason = said(error).splitlines()[0].rstrip(" .:")
        raise CheckpointError(
            f"the tokenizer in {folder} must be one that transformers loads, but: {reason}; fetch its files again, or put "
            "another's in their place."
        ) from error


def pad_token(tokenizer: Any, vocab_size: int | None = None) -> int:
    """The id that fills up rows; it is never a label that counts. With `vocab_size` it is below that: some tokenizers were given a
    padding token that their model has no row for."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (vocab_size is None or 0 <= token < vocab_size):
            return int(token)
    return 0


class TextEncoder:
    """Documents and pairs of plain text: what the tokenizer puts before them stays, and its end-of-text token closes them."""

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
        """The tokens of a whole document, its end included."""
        return self._ended(list(self.tokenizer(text)["input_ids"]))

    def encode(self, text: str) -> Sample:
        """A document that is learned as a whole."""
        tokens = self.document(text)
        return Sample(tokens, [True] * len(tokens))

    def pair(self, prompt: str, completion: str) -> Sample:
        """A prompt, and what should follow, which alone is learned.

        The two are tokenised apart, as a generation meets them: no token reaches over the boundary.
        """
        before = list(self.tokenizer(prompt)["input_ids"])
        while before and before[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text
            before.pop()
        after = self._ended(list(self.tokenizer(completion, add_special_tokens=False)["input_ids"]))
        return Sample(before + after, [False] * len(before) + [True] * len(after))

    def _ended(self, tokens: list[int]) -> list[int]:
        end: int = self.tokenizer.eos_token_id
        return tokens if tokens and tokens[-1] == end else [*tokens, end]
