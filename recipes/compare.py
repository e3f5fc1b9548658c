"""Compares a model with transformers' module by module: recipe=compare model.path=... parallel=tp2.

The same tokens go through both, in any layout; the report names the first module of transformers whose computation differs. Without
model.path, compares the tiny model of `family`. recipe.options.tolerance sets the largest allowed difference.
"""

from __future__ import annotations

from pathlib import Path

from megabridge.config.schema import Config
from megabridge.conformance import check_family, layer_parity, tiny_model
from megabridge.errors import ConfigError, ParityError
from megabridge.families import register_named
from megabridge.loggers import Reporter
from megabridge.parallel.collectives import on_rank_zero
from megabridge.training import build


def main(config: Config) -> None:
    """Every rank calls it, in running process groups. Raises ParityError where a module differs."""
    folder = Path(config.run_dir) / "compare"
    if config.model.path is None:
        if config.family is None:
            raise ConfigError(
                "recipe=compare needs weights that transformers can read too: model.path=<folder or hub id>, or "
                "family=<module:NAME> for its tiny model; set one of them."
            )
        family = register_named(config.family)
        tiny = tiny_model.tiny_config(family, check_family.LAYERS)
        on_rank_zero("making the tiny model", lambda: tiny_model.write_tiny_model(folder / "tiny", tiny, family).exists())
        config = check_family.tiny_model_config(config, folder / "tiny")
    with Reporter(config, build.loggers(config)) as report:
        bridge = build.bridge(config)
        provider = build.provider(config, bridge)
        chunks = provider.provide_distributed_model(wrap_with_ddp=False, init=build.init(config))
        report.say(provider.describe())
        found = layer_parity.compare_model(config, bridge, chunks, folder / "events.pt")
        for line in found.lines():
            report.say(line)
    if found.fault is not None:
        raise ParityError(f"{bridge.source.family.architecture}: first difference in {found.fault.module}: {found.fault.why}")
