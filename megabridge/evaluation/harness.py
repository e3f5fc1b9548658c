"""Runs lm-evaluation-harness. Only this module imports it: in a process that evaluates, never in one that trains.

Importing it changes no state, but its evaluation seeds every random generator (lm_eval 0.4.13: evaluator.simple_evaluate).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megabridge.config import optional_packages
from megabridge.evaluation.tasks import Harness, Task

_BOOTSTRAP: Final = 1000
"""Bootstrap resamples for the standard error of metrics that have no formula for it."""


def problems(tasks: Mapping[str, Task]) -> list[str]:
    """Returns a line for each name that the harness doesn't know, or one about why it can't be imported."""
    found: list[str] = []
    for place, task in tasks.items():
        if not isinstance(task, Harness):
            continue
        try:
            # Also imports what an evaluation needs, so that a broken installation is found before training.
            import lm_eval.evaluator
            import lm_eval.models.huggingface  # noqa: F401

            manager = _known(task)
        except ImportError as error:
            return [f"{place}: lm_eval can't be imported: {error}; pip install 'megabridge[eval]'"]
        found += [
            f"{place}.tasks: lm-evaluation-harness has no {name!r}; `lm-eval ls tasks` lists its tasks, include_path adds yours"
            for name in task.tasks
            if not manager.match_tasks([name])
        ]
    return found


def evaluate(task: Harness, model: Any, tokenizer: Any, *, batch_size: int) -> dict[str, float]:
    """Returns the harness's metrics as TASK/METRIC, TASK/METRIC_FILTER for filtered answers, METRIC_stderr for standard errors."""
    optional_packages.require("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _known(task)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=manager.match_tasks(task.tasks),
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        task_manager=manager,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=False,
        confirm_run_unsafe_code=False,
    )
    metrics: dict[str, float] = {}
    for name, results in found["results"].items():
        metrics |= {f"{name}/{metric}": value for metric, value in _numbers(results).items()}
    return metrics


def _known(task: Harness) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task.include_path)


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a harness result such as {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...}."""
    numbers = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float):
            numbers[metric if kind == "none" else f"{metric}_{kind}"] = float(value)
    return numbers
