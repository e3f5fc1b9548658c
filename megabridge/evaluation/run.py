"""Evaluates all tasks on one folder, in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from megabridge.conversion.parity import load_hf
from megabridge.data.text import load_tokenizer
from megabridge.data.vocabulary import check_tokens
from megabridge.errors import ConfigError
from megabridge.evaluation import harness, measures, scoring
from megabridge.evaluation.tasks import Generations, MultipleChoice, Perplexity, Task, specs
from megabridge.families.core.ranges import POSITIONS
from megabridge.hf import assets
from megabridge.storage import atomic_files, folders

FILE: Final = "evaluation.json"
TABLE: Final = "generations"
"""Name of the table of generated texts in loggers."""
_POSITIONS: Final = ("max_position_embeddings", "n_positions")
"""Keys of configs for the longest sequence of a model."""
_LONGEST: Final = 2048
"""Longest sequence in tokens where neither config nor tokenizer gives one, as in lm-evaluation-harness."""


@dataclass
class Results:
    """The results of an evaluation."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics by task and name: held_out/perplexity."""
    generations: list[dict[str, str]] = field(default_factory=list)
    """Rows of {task, prompt, text}."""

    def line(self) -> str:
        """Returns the metrics as one line for people, without the sizes of the sets and standard errors."""
        shown = {
            name: value
            for name, value in self.metrics.items()
            if not name.endswith(("/tokens", "/bytes", "/questions", "/nats_per_token")) and "_stderr" not in name
        }
        texts = [f"{len(self.generations)} texts"] if self.generations else []
        return ", ".join([f"{name} {value:.4g}" for name, value in shown.items()] + texts)


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Loads transformers' model of a folder, in its own dtype, and its tokenizer. No code of the folder is run.

    The model raises ConfigError for token ids outside its vocabulary.
    """
    model, tokenizer = load_hf(folder, "auto").to(device), load_tokenizer(folder)
    size = measures.vocabulary(model)
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: check_tokens(inputs[0], size, "tokens"))
    return model, tokenizer


def evaluate(folder: Path, tasks: Mapping[str, Task], *, batch_size: int, device: str = "cpu") -> Results:
    """Evaluates `tasks` on the model in `folder`. Changes torch's random state: see harness.

    Raises ConfigError for a folder or a task that can't be evaluated.
    """
    model, tokenizer = load(folder, device)
    results = Results()
    for name, task in tasks.items():
        if isinstance(task, Generations):
            results.generations += [{"task": name, **row} for row in measures.generations(task, model, tokenizer)]
            continue
        if isinstance(task, Perplexity):
            found = measures.perplexity(task, model, tokenizer, batch_size=batch_size)
        elif isinstance(task, MultipleChoice):
            limit = longest(folder, tokenizer)
            found = measures.multiple_choice(task, model, tokenizer, batch_size=batch_size, longest=limit)
        else:
            found = harness.evaluate(task, model, tokenizer, batch_size=batch_size)
        results.metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
    return results


def problems(folder: Path, tasks: Mapping[str, Task]) -> list[str]:
    """Returns a line for each reason why a model with the config and tokenizer in `folder` can't be evaluated on `tasks`."""
    if not any(folder.glob("tokenizer*")):
        return [f"{folder} must hold a tokenizer to be evaluated with; put one there, or name another model"]
    tokenizer = load_tokenizer(folder)
    most, found = longest(folder, tokenizer), []
    for name, task in tasks.items():
        if isinstance(task, Perplexity) and (task.seq_length or 0) > most:
            found.append(f"{name}: seq_length={task.seq_length} must be at most {most}, the longest sequence of the model")
    if any(isinstance(task, Perplexity | MultipleChoice) for task in tasks.values()):
        try:
            scoring.prefix(tokenizer)
        except ConfigError as error:
            found.append(str(error))
    return found


def write(file: Path, folder: Path, tasks: Mapping[str, Task], results: Results) -> None:
    """Writes tasks and results as JSON, atomically. Figures that aren't finite become null."""
    figures = {name: value if math.isfinite(value) else None for name, value in results.metrics.items()}
    content = {"folder": str(folder), "tasks": specs(tasks), "metrics": figures, "generations": results.generations}
    atomic_files.write(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    folders.fsync(file.parent)


def longest(folder: Path, tokenizer: Any) -> int:
    """Returns the model's longest sequence in tokens, from its config or else its tokenizer."""
    config = assets.read_config(folder)
    for key in _POSITIONS:
        if POSITIONS.allows(config.get(key)):
            return int(config[key])
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 10**9 else _LONGEST


def device_name(device: str) -> str:
    """Returns torch's device name for auto, cpu or cuda[:n]. Raises ConfigError for another name, or if there is no CUDA."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not device.startswith("cuda"):
        raise ConfigError(f"device={device!r} must be auto, cpu, cuda or cuda:<n>.")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r} needs a CUDA device, but there is none; use cpu or auto.")
    return device
