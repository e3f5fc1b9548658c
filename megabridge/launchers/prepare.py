"""From what Hydra composed to what a run needs: plain values and the typed config; what can't work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megabridge import bounds, checks, config, explain, redact, whole
from megabridge.errors import ConfigError
from megabridge.launchers import claim


def conf_folder() -> Path:
    """The config groups: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def resolve(cfg: DictConfig, run_dir: Path | None = None) -> tuple[dict[str, Any], config.Config]:
    """The config's plain values and its typed form, `run_dir` (None: its own) absolute. Raises ConfigError for what can't work."""
    values: Any = _resolved(cfg)
    values["run_dir"] = str((Path(str(values["run_dir"])) if run_dir is None else run_dir).absolute())
    try:
        typed = config.typed(values)
    except OmegaConfBaseException as error:  # an interpolation brought another type, or ++ another key
        raise ConfigError(explain.explain(error, conf_folder())) from error
    bounds.check_numbers(typed)
    bounds.check_paths(typed)
    checks.check_choices(typed)
    checks.check_targets(typed)
    checks.check_model(typed)
    checks.check_peft(typed)
    checks.check_named(typed)
    checks.check_training(typed)
    return values, typed


def _resolved(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except Exception as error:
        raise ConfigError(explain.explain(error, conf_folder())) from error


def write_config(cfg: DictConfig, values: dict[str, Any]) -> None:
    """Leaves the resolved config, without secrets, as config.yaml in the run directory, which the caller has claimed.

    Raises ConfigError where it can't; then an earlier one is as it was.
    """
    folder = Path(values["run_dir"])
    content = redact.redacted(OmegaConf.to_container(cfg, resolve=False), values)
    try:
        whole.write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
    except OSError as error:
        raise claim.unusable(folder, "run_dir", error) from error
