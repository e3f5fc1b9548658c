"""Downloads models, tokenizers and data to this user's caches; hydra/launcher=slurm runs it before it submits."""

from __future__ import annotations

import dataclasses
import json
import tempfile

from megabridge.config import schema
from megabridge.config.schema import Config
from megabridge.hf import resolve
from megabridge.training import build


def main(config: Config) -> None:
    """Fetches each distinct model and data set of the resolved configs recipe.options.points once. One process calls it."""
    fetched = set()
    for values in config.recipe.options["points"]:
        point = schema.typed(values)
        needed = json.dumps([dataclasses.asdict(point.model), point.data, point.recipe.target], sort_keys=True, default=str)
        if needed not in fetched:
            fetched.add(needed)
            fetch(point)


def fetch(config: Config) -> None:
    """Fetches one config's model and tokenizer and, if it trains, its data, by setting it up as the ranks will."""
    model = config.model
    if model.path is not None:
        resolve.resolve(
            model.path,
            revision=model.revision,
            config_only=not model.load_weights,
            code=model.trust_remote_code,
            allow_bin=config.conversion.allow_bin,
        )
    if config.recipe.steps == 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        config.run_dir = folder
        build.data(config, build.bridge(config))
