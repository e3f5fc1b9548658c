"""What the ranks of tests/recipes and tests/callbacks run: whole recipes on a tiny Hugging Face model."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, override

import torch

from megabridge.callbacks import Callback
from megabridge.config import schema
from megabridge.data import DataModule
from megabridge.families import register_named
from tests.support import tiny
from tests.support.models import TINY

SHAPE = {**TINY, "vocab_size": 61, "num_hidden_layers": 3}


class TinyData(DataModule):
    """The samples of the trainer's tests."""

    @override
    def setup(self, tokenizer_folder: Path, **sizes: Any) -> None:
        assert (tokenizer_folder / "config.json").is_file()
        self.samples = tiny.Samples(sizes["micro_batch_size"])

    @override
    def train_batches(self, consumed_samples: int, **place: int) -> Iterator[dict[str, torch.Tensor]]:
        return self.samples.train_batches(consumed_samples, **place)

    @override
    def validation_batches(self, **place: int) -> list[dict[str, torch.Tensor]]:
        return self.samples.validation_batches(**place)


class HookOrder(Callback):
    """Writes down which hooks were called, in hooks.json of the run."""

    HOOKS = tuple(name for name in vars(Callback) if name.startswith(("on_", "before_", "after_")))

    def __init__(self) -> None:
        self.calls: list[str] = []
        for name in self.HOOKS:
            setattr(self, name, lambda trainer, *_, name=name: self._note(trainer, name))

    def _note(self, trainer: Any, name: str) -> None:
        self.calls.append(name)
        if trainer.is_main:
            (trainer.run_dir / "hooks.json").write_text(json.dumps(self.calls))


class Killed(Callback):
    """Ends its process after the native checkpoint of step `step`, before anything else of that save."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_save(self, trainer: Any, step: int, folder: Path) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(Callback):
    """Says that the second step has begun, which then takes ten minutes."""

    @override
    def before_step(self, trainer: Any) -> None:
        if trainer.step == 1:
            (trainer.run_dir / "slow").touch()
            time.sleep(600)


def make_source(folder: str, *, tokenizer: bool = False) -> None:
    """A Hugging Face folder with random weights, and a tokenizer of letters where asked for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    Path(folder).mkdir(parents=True)
    Path(folder, "config.json").write_text(json.dumps(SHAPE))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    if tokenizer:
        _letters().save_pretrained(folder)


def _letters() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(ord("A"), ord("A") + 58))]
    letters = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def recipe(name: str, values: dict[str, Any]) -> float | None:
    """Runs recipes.`name`:main on the config with `values`, as the worker would."""
    config = schema.typed(values)
    if config.family is not None:
        register_named(config.family)
    result: float | None = importlib.import_module(f"recipes.{name}").main(config)
    return result
