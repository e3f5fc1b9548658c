"""Real text that comes with Python: the topics of `help()` as chat pairs. The default data; it needs no network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, override

from megabridge.data import digests
from megabridge.data.batches import OVERLONG, Batching, Fitted, Overlong, Sample, fit
from megabridge.data.chat import ChatEncoder
from megabridge.data.module import Batch, DataModule
from megabridge.data.text import pad_token
from megabridge.data.vocabulary import check_ids
from megabridge.errors import ConfigError

CHARACTERS: Final = 16
"""Maximum number of characters per token that are tokenised: some topics have 60,000, and only the beginning fits."""


class PydocTopics(DataModule):
    """Data with one sample per topic of `pydoc_data.topics`: the question is `prompt`, the answer is the topic's text.

    Topics are held out for validation by their names alone. The text differs a little between versions of Python.
    """

    def __init__(
        self,
        *,
        prompt: str = "Explain the Python topic '{topic}'.",
        validation_share: float = 0.1,
        overlong: Overlong = "truncate",
        pad_to: int | None = None,
        answers_only: bool = True,
        template_arguments: Mapping[str, object] | None = None,
    ) -> None:
        """`overlong`: whether a topic that is too long is truncated or left out. `pad_to`: see `Batching`. `answers_only=False`:
        the question and the template are learned too. Raises ConfigError.
        """
        if not 0 < validation_share < 1:
            raise ConfigError(f"data.validation_share={validation_share} must be between 0 and 1, e.g. 0.1.")
        if overlong not in OVERLONG:
            raise ConfigError(f"data.overlong={overlong!r} must be one of {', '.join(OVERLONG)}.")
        if "{topic}" not in prompt:
            raise ConfigError(f"data.prompt={prompt!r} must contain {{topic}}, where the topic's name goes.")
        self._prompt = prompt
        self._validation_share = validation_share
        self._overlong = overlong
        self._pad_to = pad_to
        self._answers_only = answers_only
        self._template_arguments = template_arguments

    @override
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        encoder = ChatEncoder(tokenizer_folder, template_arguments=self._template_arguments)
        self._seed = seed
        pad = pad_token(encoder.tokenizer, self.vocab_size)
        self._batching = Batching(seq_length, micro_batch_size, global_batch_size, pad, self._pad_to)
        train, validation = split(self._validation_share)
        self.train = self._fitted(encoder, train)
        self.validation = self._fitted(encoder, validation)

    def _fitted(self, encoder: ChatEncoder, topics: Mapping[str, str]) -> Fitted:
        length = self._batching.seq_length
        samples = [self._sample(encoder, topic, text, CHARACTERS * (length + 1)) for topic, text in topics.items()]
        return fit(samples, seq_length=length, overlong=self._overlong)

    def _sample(self, encoder: ChatEncoder, topic: str, text: str, characters: int) -> Sample:
        question = {"role": "user", "content": self._prompt.replace("{topic}", topic)}
        sample = encoder.encode([question, {"role": "assistant", "content": text.strip()[:characters].rstrip()}])
        check_ids(sample.tokens, self.vocab_size, f"the topic {topic!r} of pydoc")
        return sample if self._answers_only else Sample(sample.tokens, [True] * len(sample.tokens))

    @override
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        return self._batching.train(self.train.samples, consumed_samples, seed=self._seed, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        return self._batching.validation(self.validation.samples, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def digest(self) -> str:
        return digests.of_samples(self.train.samples, self.validation.samples)

    @override
    def describe(self) -> str:
        return f"pydoc topics: train {self.train.describe()}; validation {self.validation.describe()}"


def split(validation_share: float) -> tuple[dict[str, str], dict[str, str]]:
    """Returns (train, validation) topics by name, sorted; the share with the lowest hashes of names is held out."""
    from pydoc_data.topics import topics  # half a megabyte

    ranked = sorted(topics, key=lambda topic: hashlib.sha256(topic.encode()).digest())
    held_out = set(ranked[: max(1, round(len(ranked) * validation_share))])
    train = {topic: topics[topic] for topic in sorted(topics) if topic not in held_out}
    return train, {topic: topics[topic] for topic in sorted(held_out)}
