"""The kinds of tasks, their settings, and the checks of them before anything is evaluated. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megabridge.config import optional_packages
from megabridge.config.validation import nearest
from megabridge.errors import ConfigError
from megabridge.evaluation import rows

_NAME: Final = re.compile(r"[\w.-]+")
_LEAST: Final = ("seq_length", "stride", "limit", "max_new_tokens")
"""Settings that must be at least 1 if given."""


@dataclass
class Perplexity:
    """Perplexity of text, in windows that score each token once."""

    path: str
    """A .jsonl file with a document per row, or any other file, which is one document of UTF-8 text."""
    column: str = "text"
    """Key of the text in the rows of a .jsonl."""
    seq_length: int | None = None
    """Tokens of a window. Null: recipe.seq_length."""
    stride: int | None = None
    """Tokens that each window after the first scores; those before them are its context. Null: half a window."""

    def problems(self) -> list[str]:
        """Returns a line for each problem with the task or its file."""
        over = self.stride and self.seq_length and self.stride > self.seq_length
        rule = [f"stride={self.stride} must be at most seq_length={self.seq_length}"] if over else []
        return rule + rows.problems_of(lambda: rows.documents(self.path, self.column))


@dataclass
class MultipleChoice:
    """Multiple-choice questions: rows of {"prompt" or "question", "choices", "answer": index from 0}."""

    path: str
    """A .jsonl file."""
    delimiter: str = " "
    """Text between the prompt and each choice."""

    def problems(self) -> list[str]:
        """Returns a line for each problem with the task or its file."""
        return rows.problems_of(lambda: rows.questions(self.path))


@dataclass
class Harness:
    """Tasks of lm-evaluation-harness, by their names there."""

    tasks: list[str]
    """Names of tasks, groups or tags; * as wildcard."""
    num_fewshot: int | None = None
    """Examples before each question. Null: the task's default."""
    limit: int | None = None
    """Maximum number of questions per task. Null: all."""
    include_path: str | None = None
    """A folder with task files of your own."""

    def problems(self) -> list[str]:
        """Returns a line for each problem; the names are looked up later (megabridge.evaluation.harness)."""
        found = [] if self.tasks else ["tasks must name at least one task of lm-evaluation-harness"]
        if self.include_path is not None and not Path(self.include_path).is_dir():
            found.append(f"include_path={self.include_path} must be a folder with task files")
        try:
            optional_packages.require("lm_eval")
        except ConfigError as error:
            found.append(str(error))
        return found


@dataclass
class Generations:
    """Greedy answers to a few prompts, logged as a table; asked through the chat template if the tokenizer has one."""

    prompts: list[str] = field(default_factory=list)
    """The prompts."""
    path: str | None = None
    """A file with more prompts: .jsonl rows of {"prompt"}, or one per line."""
    max_new_tokens: int = 48
    """Maximum length of an answer in tokens."""

    def problems(self) -> list[str]:
        """Returns a line for each problem with the task or its file."""
        if not self.prompts and self.path is None:
            return ["prompts or path must be given"]
        path = self.path
        return [] if path is None else rows.problems_of(lambda: rows.prompts(path))


Task = Perplexity | MultipleChoice | Harness | Generations
KINDS: Final[Mapping[str, type[Task]]] = {
    "perplexity": Perplexity,
    "multiple_choice": MultipleChoice,
    "lm_eval": Harness,
    "generations": Generations,
}


def parsed(specs: object, *, where: str, seq_length: int) -> tuple[dict[str, Task], list[str]]:
    """Returns the tasks of a config node by name, and a line for each problem with them or their files.

    `where` is the node's path in the config; `seq_length` is the default of tasks that need one.
    """
    if not isinstance(specs, Mapping) or not specs:
        return {}, [f"{where}={specs!r} must map names to tasks, e.g. {{held_out: {{kind: perplexity, path: held_out.txt}}}}"]
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    for name, spec in specs.items():
        place = f"{where}.{name}"
        if not _NAME.fullmatch(str(name)):
            problems.append(f"{place}: the name must consist of letters, digits, _, - and .")
        try:
            task = _task(spec, place)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if isinstance(task, Perplexity):
            task.seq_length = seq_length if task.seq_length is None else task.seq_length
        sizes = {key: value for key, value in vars(task).items() if key in _LEAST and value is not None}
        problems += [f"{place}.{key}={value} must be at least 1" for key, value in sizes.items() if value < 1]
        problems += [f"{place}: {problem}" for problem in task.problems()]
        tasks[str(name)] = task
    return tasks, problems


def _task(spec: object, place: str) -> Task:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{place}={spec!r} must be a task with a kind, one of {', '.join(KINDS)}")
    kind = str(spec.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"{place}.kind={kind!r} is not one of {', '.join(KINDS)}{nearest(kind, list(KINDS))}")
    chosen = KINDS[kind]
    settings = {str(key): value for key, value in spec.items() if key != "kind"}
    known = {each.name: each for each in dataclasses.fields(chosen)}
    wrong = [f"{place}.{key}: {kind} has no such setting{nearest(key, list(known))}" for key in settings if key not in known]
    required = [key for key, each in known.items() if each.default is each.default_factory is dataclasses.MISSING]
    wrong += [f"{place}.{key} must be given" for key in required if settings.get(key) is None]
    if wrong:
        raise ConfigError("\n  ".join(wrong))
    try:
        task: Task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(chosen), settings))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{place}.{error.full_key}: {str(error).splitlines()[0]}") from error
    return task


def specs(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Returns the tasks in the form that `parsed` takes, with every setting given."""
    kinds = {chosen: kind for kind, chosen in KINDS.items()}
    return {name: {"kind": kinds[type(task)], **dataclasses.asdict(task)} for name, task in tasks.items()}


def asks_harness(tasks: Mapping[str, Task]) -> bool:
    """Whether lm-evaluation-harness is needed and installed; `parsed` reports where it is missing."""
    return optional_packages.is_installed("lm_eval") and any(isinstance(task, Harness) for task in tasks.values())
