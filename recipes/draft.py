"""Drafts a family file: recipe=draft model.path=...

Reads config.json and the headers of the safetensors files, but no weights; unrecognised parts are marked in the file with TODO.
recipe.options.output names the file; by default it is in the run directory.
"""

from __future__ import annotations

from pathlib import Path

from megabridge.config.schema import Config
from megabridge.conformance import draft
from megabridge.errors import ConfigError
from megabridge.hf import assets, resolve
from megabridge.hf.quantised_weights import find_weights
from megabridge.loggers import Reporter
from megabridge.training import build


def main(config: Config) -> None:
    """One process calls it, without process groups."""
    if config.model.path is None:
        raise ConfigError("recipe=draft needs model.path=<folder or hub id>; set it.")
    folder = resolve.resolve(config.model.path, revision=config.model.revision)
    hf = assets.read_config(folder)
    shapes = {name: info.shape for name, info in find_weights(folder).items()}
    text, todo = draft.draft(hf, shapes, Path(config.model.path).name)
    file = Path(config.recipe.options.get("output") or Path(config.run_dir) / f"{draft.module_name(hf)}.py")
    if file.exists():
        raise ConfigError(f"{file} exists; remove it, or name another file with +recipe.options.output=<file>.")
    file.write_text(text, encoding="utf-8")
    with Reporter(config, build.loggers(config)) as report:
        report.say(f"family file: {file}")
        for line in todo:
            report.say(f"TODO {line}")
        report.say(
            f"next: PYTHONPATH={file.parent} python -m megabridge.run recipe=check model.path={config.model.path} "
            f"family={file.stem}:FAMILY"
        )
