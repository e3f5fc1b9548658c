"""Checks a family, and a model of it: recipe=check model.path=... [family=package.module:NAME] [parallel.dp=4].

The family's tiny model, with random weights from transformers, is checked under every layout of the given number of ranks: names in
both directions, bytes of import and export, logits, gradients. With `model.path`, that model's config and headers are checked too,
and its weights if they fit into memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megabridge.config.schema import Config
from megabridge.conformance import check_family, check_model, findings
from megabridge.errors import ConfigError, ParityError
from megabridge.families import family_for, register_named
from megabridge.loggers import Reporter
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import on_rank_zero
from megabridge.training import build


def main(config: Config) -> None:
    """Every rank calls it, in running process groups, which it stops and restarts. Raises ParityError with all failures."""
    folder, world_size = Path(config.run_dir) / "check", process_groups.world_size()
    folder.mkdir(parents=True, exist_ok=True)
    with Reporter(config, build.loggers(config)) as report:
        given = config.model.path is not None or bool(config.model.hf)
        family = family_for(build.model_config(config)) if config.family is None else register_named(config.family)
        if given and family_for(build.model_config(config)) is not family:
            raise ConfigError(f"family={config.family} is for {family.architecture}, but the model is not; name one that fits.")
        found = check_family.check_family(config, family, folder / "tiny", world_size, report.say)
        if given:
            found += check_model.check_model(config, world_size, folder / "exported")
        for line in findings.table(found):
            report.say(line)
    content = json.dumps([asdict(finding) for finding in found], indent=2) + "\n"
    on_rank_zero("writing the findings", lambda: (folder / "findings.json").write_text(content))
    if problems := check_family.verdict(family.architecture, found):
        raise ParityError(problems)
