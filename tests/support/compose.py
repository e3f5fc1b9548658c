"""Composes configs in this process, as the parent of a run does."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from megabridge.config import schema
from megabridge.launchers.prepare import conf_folder


def compose(*overrides: str) -> DictConfig:
    """The composed config of `python -m megabridge.run <overrides>`."""
    schema.register()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return hydra.compose("config", list(overrides))
