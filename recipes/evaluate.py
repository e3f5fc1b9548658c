"""Evaluates a Hugging Face model in transformers: recipe=evaluate model.path=FOLDER 'recipe.options.tasks={...}'.

The tasks are those of callbacks=evaluate (docs/training.md). The results are logged and written to evaluation.json.
"""

from __future__ import annotations

from pathlib import Path

from megabridge import evaluation
from megabridge.config.schema import Config
from megabridge.errors import ConfigError, listed
from megabridge.evaluation import harness
from megabridge.hf import resolve
from megabridge.loggers import Reporter
from megabridge.training import build


def main(config: Config) -> None:
    """One process calls it, without process groups. Raises ConfigError with all problems of the tasks."""
    options, model = config.recipe.options, config.model
    tasks, problems = evaluation.parsed(options["tasks"], where="recipe.options.tasks", seq_length=config.recipe.seq_length)
    device = evaluation.device_name(options["device"])
    if model.path is None:
        problems.append("model.path must name the folder or hub id to evaluate")
    if problems:
        raise ConfigError(listed(problems))
    folder = resolve.resolve(str(model.path), revision=model.revision)
    if problems := evaluation.problems(folder, tasks) + harness.problems(tasks):
        raise ConfigError(listed(problems))
    with Reporter(config, build.loggers(config)) as report:
        results = evaluation.evaluate(folder, tasks, batch_size=options["batch_size"], device=device)
        evaluation.write(Path(config.run_dir) / evaluation.FILE, folder, tasks, results)
        report.log(0, {f"evaluation/{name}": value for name, value in results.metrics.items()})
        if results.generations:
            report.table(0, evaluation.TABLE, results.generations)
        report.say(f"evaluation of {folder}: {results.line()}")
