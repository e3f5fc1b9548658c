"""Resolves and checks the config that Hydra composed, and writes it to the run directory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megabridge.config import bounds, error_messages, readers, redaction, schema, validation
from megabridge.errors import ConfigError
from megabridge.launchers import run_lock
from megabridge.storage import atomic_files


def conf_folder() -> Path:
    """The folder of config groups: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def resolve(cfg: DictConfig, run_dir: Path | None = None, overrides: Collection[str] = ()) -> tuple[dict[str, Any], schema.Config]:
    """Returns the config's plain values and its typed form, with an absolute `run_dir` (None: the config's own).

    `overrides` are those of the command line. Raises ConfigError for settings that can't work or would have no effect.
    """
    values: Any = _resolved(cfg)
    values["run_dir"] = str((Path(str(values["run_dir"])) if run_dir is None else run_dir).absolute())
    try:
        typed = schema.typed(values)
    except OmegaConfBaseException as error:  # an interpolation of another type, or an unknown key added with ++
        raise ConfigError(error_messages.explain(error, conf_folder())) from error
    validation.check_format(typed)
    bounds.check_numbers(typed)
    bounds.check_paths(typed)
    validation.check_choices(typed)
    validation.check_targets(typed)
    validation.check_model(typed)
    validation.check_peft(typed)
    validation.check_named(typed)
    validation.check_training(typed)
    readers.check_readers(typed, overrides, conf_folder())
    return values, typed


def _resolved(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except Exception as error:
        raise ConfigError(error_messages.explain(error, conf_folder())) from error


def write_config(cfg: DictConfig, values: dict[str, Any]) -> None:
    """Writes the resolved config, without secrets, as config.yaml in the run directory, which the caller has locked.

    Raises ConfigError on failure, and then leaves an earlier file as it was.
    """
    folder = Path(values["run_dir"])
    content = redaction.redacted(OmegaConf.to_container(cfg, resolve=False), values)
    try:
        atomic_files.write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
    except OSError as error:
        raise run_lock.unusable(folder, "run_dir", error) from error
