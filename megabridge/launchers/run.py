"""The command `megabridge.run` in the parent process, or in a rank of torchrun or srun. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from megabridge.config import error_messages, redaction, schema, synonyms, validation
from megabridge.errors import ConfigError, MegabridgeError, plain
from megabridge.families.core.known_sizes import known_sizes
from megabridge.launchers import (
    chosen_layout,
    doctor,
    local,
    made_folders,
    preflight,
    rank_environment,
    rank_task,
    resuming,
    run_lock,
    settings,
)
from megabridge.launchers.platform_choice import choose_platform
from megabridge.launchers.prepare import conf_folder, resolve, write_config
from megabridge.launchers.processes.outcome import CONFIG_ERROR, Terminated, WorkerFailure
from megabridge.launchers.sweep import SweepFailure
from megabridge.parallel import hardware
from megabridge.storage import start_lines
from megabridge.version import VERSION

COMMANDS: Final = "commands.txt"
"""The commands that a run's directory was started with, a line each, without secrets."""
FULL_ERROR: Final = "HYDRA_FULL_ERROR"
"""Environment variable of a user who wants tracebacks instead of one line."""


HELP: Final = """\
megabridge: train Hugging Face models with Megatron-Core.

  python -m megabridge.run [flags] [group=choice ...] [key=value ...]
  python -m megabridge.run doctor      what is installed here, and the remedy of each gap

Groups and their choices:
{groups}

Every key is documented in megabridge/config/schema.py. Flags of Hydra, before the overrides:
  --cfg job              show the config of a run, and don't run (-p GROUP: only that part)
  --version              the version of megabridge
  -m, --multirun         sweep: parallel=single,tp2 optimizer.lr=1e-5,3e-5
  -cd, --config-dir DIR  your own groups and choices, before ours
  --hydra-help           all of Hydra's flags"""


@dataclass
class _Progress:
    """Progress of this process: an error of Hydra's before the config is composed is a config error."""

    is_composed: bool = False


_progress = _Progress()


def main() -> int:
    """Runs the command; returns an exit status from the list in megabridge.run's docstring."""
    wants_traceback = FULL_ERROR in os.environ
    start_lines.begin()
    try:
        cwd = str(Path.cwd())
    except OSError as error:
        _say(f"the working directory must exist, but can't be found ({error.strerror}); change to another.")
        return CONFIG_ERROR
    if "" not in sys.path and cwd not in sys.path:
        # As `python -m` does, so that the console script finds the user's own classes and recipes too.
        sys.path.insert(0, cwd)
    sys.argv[1:] = redaction.carry(sys.argv[1:])
    if {"--help", "-h"} & set(sys.argv[1:]):
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(_help())
        return 0
    if "--version" in sys.argv[1:]:
        print(f"megabridge {VERSION}")
        return 0
    if sys.argv[1:2] == ["doctor"]:
        return doctor.main()
    try:
        schema.register()
        settings.register()
        if said := synonyms.of_flags(sys.argv[1:]):
            raise ConfigError(said)
        here = rank_environment.find(os.environ)
        # Makes Hydra raise instead of printing and exiting.
        os.environ[FULL_ERROR] = "1"
        if here is not None:
            return _become_rank(here)
        _run_hydra()
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    except WorkerFailure as error:
        _say(str(error))
        return error.failure.status
    except SweepFailure as error:
        _say(str(error))
        return error.status
    except Exception as error:
        if wants_traceback:
            raise
        if not isinstance(error, MegabridgeError) and _progress.is_composed:
            raise
        _say(str(error) if isinstance(error, MegabridgeError) else error_messages.explain(error, conf_folder(), settings.keys()))
        return CONFIG_ERROR
    finally:
        made_folders.take_back()
        if not wants_traceback:
            os.environ.pop(FULL_ERROR, None)
    return 0


def _say(text: str) -> None:
    said = f"megabridge: {plain(text)}"
    print(said, file=sys.stderr, flush=True)
    start_lines.record(said)


def _help() -> str:
    """Text of --help. Hydra's own help takes a second: it reads every config group twice, including its own."""
    folders = sorted(folder for folder in conf_folder().iterdir() if folder.is_dir())
    groups = [f"  {folder.name}: {', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}" for folder in folders]
    return HELP.format(groups="\n".join(groups))


def _run_hydra() -> None:
    made_folders.watch()
    # Hydra finds plugins in the folder hydra_plugins of an entry of sys.path. The last entry, so that it hides nothing.
    sys.path.append(str(Path(__file__).resolve().parent / "plugins"))
    run: Callable[[], None] = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(job)
    run()


def job(cfg: DictConfig) -> float | None:
    """Runs one job; Hydra calls it with the composed config. Returns the recipe's objective (the validation loss)."""
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    try:
        _progress.is_composed = True
        launcher = hydra_config.runtime.choices["hydra/launcher"]
        if not is_sweep and launcher != "basic":
            raise ConfigError(f"hydra/launcher={launcher} starts the points of a sweep, also of a single one; add -m.")
        # As they were typed: iterating over them would resolve the interpolations in them.
        overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        flags: Any = OmegaConf.to_container(hydra_config.overrides.hydra, resolve=False)
        return _launch(cfg, Path(hydra_config.runtime.output_dir), overrides, [*flags, *overrides])
    except MegabridgeError as error:
        # In a sweep the other jobs still run, and Hydra reports this one. For a single job Hydra would print the overrides too.
        if is_sweep:
            raise
        _say(str(error))
        sys.exit(error.failure.status if isinstance(error, WorkerFailure) else CONFIG_ERROR)


def _launch(cfg: DictConfig, run_dir: Path, overrides: list[str], typed: list[str]) -> float | None:
    values, run_config = resolve(cfg, run_dir, overrides)
    run_config = chosen_layout.settle(cfg, values, run_config, overrides, lambda: chosen_layout.here(run_config))
    if not chosen_layout.is_open(run_config):
        validation.check_layout(run_config, schema.topology(run_config.parallel), known_sizes(run_config.model))
    topology = schema.processes(run_config)
    platform = choose_platform(
        run_config, topology, gpus=hardware.visible_gpus(), memory=hardware.memory_bytes(), overrides=overrides
    )
    run_lock.check(Path(values["run_dir"]))
    preflight.check(run_config, platform=platform, asks_hub=True)
    with run_lock.claimed(Path(values["run_dir"])) as lock:
        made_folders.keep()
        write_config(cfg, values)
        _begin(values, typed)
        if not run_config.recipe.single_process:
            start_lines.say(f"starting {_ranks(topology.world_size)} on this host's {'CPU' if platform == 'cpu' else 'GPUs'}")
        objective = local.launch(values, world_size=topology.world_size, platform=platform, pass_fds=(lock,), overrides=typed)
        _close(values, typed)
        return objective


def _begin(values: dict[str, Any], overrides: list[str]) -> None:
    """What the run's directory keeps of its start: the command, below those before it, and from now on what is said."""
    folder = Path(values["run_dir"])
    start_lines.keep_in(folder)
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {resuming.command(values, overrides, is_auto=False)}\n"
    with contextlib.suppress(OSError), (folder / COMMANDS).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(line)


def _close(values: dict[str, Any], overrides: list[str]) -> None:
    """Says where everything is, and what may come next."""
    for line in resuming.closing(values, overrides):
        start_lines.say(line)


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count != 1 else ''}"


def _become_rank(here: rank_environment.RankEnvironment) -> int:
    """Composes the config as every other rank does, and runs the rank; returns the exit status."""
    parser = get_args_parser()
    arguments = parser.parse_args()
    if arguments.hydra_help or arguments.cfg or arguments.info:
        if here.rank == 0:
            _run_hydra()
        return 0
    if arguments.multirun:
        raise ConfigError("-m starts several runs, but torchrun or srun started this one as rank; sweep without them.")
    cfg = _compose(arguments)
    values, run_config = resolve(cfg, overrides=arguments.overrides)
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    raw.pop("run_dir")  # rank 0's is used
    digest = sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()
    if here.rank == 0:  # whose layout, too, is that of all
        machine = partial(chosen_layout.here, run_config, here.world_size)
        run_config = chosen_layout.settle(cfg, values, run_config, arguments.overrides, machine)
    if not chosen_layout.is_open(run_config):
        started = schema.processes(run_config, here.world_size)
        layout = schema.topology(run_config.parallel) if run_config.recipe.single_process else started
        validation.check_layout(run_config, layout, known_sizes(run_config.model))
    if here.rank:
        return rank_task.supervise(values, here, digest=digest, overrides=arguments.overrides)
    run_lock.check(Path(values["run_dir"]))
    preflight.check(run_config, platform=run_config.platform)
    with run_lock.claimed(Path(values["run_dir"])) as lock:
        write_config(cfg, values)
        _begin(values, arguments.overrides)
        start_lines.say(f"starting {_ranks(here.world_size)}")
        status = rank_task.supervise(values, here, digest=digest, pass_fds=(lock,), overrides=arguments.overrides)
        if status == 0:
            _close(values, arguments.overrides)
        return status


def _compose(arguments: Any) -> DictConfig:
    """Composes the config without Hydra's job runner, which would make a run directory on every rank."""
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="run"):
        overrides = list(arguments.overrides)
        if arguments.config_dir:
            overrides.append(f"hydra.searchpath=[file://{Path(arguments.config_dir).absolute()}]")
        cfg = hydra.compose(arguments.config_name or "config", overrides)
    _progress.is_composed = True
    return cfg
