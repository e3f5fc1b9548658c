"""Lets the source model and the exported one answer the same question at the end of a run, both in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, override

from megabridge import evaluation
from megabridge.conversion.parity import is_readable
from megabridge.errors import CheckpointError, ConfigError
from megabridge.hf.tensor_files import find_tensors
from megabridge.parallel import collectives
from megabridge.training.hooks import Callback

if TYPE_CHECKING:
    from megabridge.bridge.auto_bridge import AutoBridge
    from megabridge.training.loop import Trainer

NEW_TOKENS: Final = 48


class Answer(Callback):
    """Adds the source model's and the exported model's greedy answers to `prompt` to the run's summary.

    Without `prompt` it does nothing. Rank 0 generates, on the CPU.
    """

    def __init__(self, prompt: str | None = None, max_new_tokens: int = NEW_TOKENS) -> None:
        self.prompt, self.max_new_tokens = prompt, max_new_tokens

    @override
    def on_end(self, trainer: Trainer) -> None:
        prompt, bridge = self.prompt, trainer.bridge
        if prompt is None or bridge is None or bridge.source.location is None or not trainer.exports:
            return
        if not any(trainer.exports[-1].glob("tokenizer*")):
            trainer.say("the question is not asked: the model has no tokenizer")
            return
        lines: list[str] = []
        with collectives.raise_together("generating answers"):
            if trainer.is_main:
                lines.append(f"question: {prompt}")
                if bridge.import_report is not None:
                    lines.append(f"source model: {self._source_answer(bridge, prompt)}")
                exported = answer(trainer.exports[-1], prompt, max_new_tokens=self.max_new_tokens)
                lines.append(f"exported model: {exported}")
        trainer.summary.extend(lines)

    def _source_answer(self, bridge: AutoBridge, prompt: str) -> str:
        try:
            folder = bridge.weights_folder()
            find_tensors(folder, allow_bin=bridge.source.allow_bin)
        except CheckpointError as error:  # the run is at its end, and everything is saved
            return f"(not asked: {error})"
        return answer(folder, prompt, max_new_tokens=self.max_new_tokens)


def answer(folder: Path, prompt: str, *, max_new_tokens: int) -> str:
    """Returns the greedy answer of the model in `folder` to `prompt`, asked through its chat template if it has one.

    Where the model can't be asked, returns the reason in brackets.
    """
    if not is_readable(folder):
        return "(not asked: transformers needs the package accelerate for quantised weights; pip install accelerate)"
    try:
        (text,) = evaluation.generate(*evaluation.load(folder, "cpu"), [prompt], max_new_tokens=max_new_tokens)
    except ConfigError as error:  # about its chat template or vocabulary; the run is at its end, and everything is saved
        return f"(not asked: {error})"
    return " ".join(text.split())
