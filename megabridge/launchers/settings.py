"""Settings of `hydra/launcher=local` and `hydra/launcher=slurm`: key, type, default, meaning. No torch.

They are checked while Hydra composes the config, as `megabridge.config.schema` is. The settings of a cluster go into a YAML of your
own, conf/hydra/launcher/NAME.yaml, which begins with `defaults: [slurm]` and is selected with hydra/launcher=NAME.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final

PLUGIN: Final = "hydra_plugins.megabridge_launchers"


@dataclass
class LocalSettings:
    _target_: str = f"{PLUGIN}.LocalLauncher"
    at_once: int | None = 1
    """Number of points that run at the same time, each on its own GPUs or cores. Null: as many as fit."""


@dataclass
class SlurmSettings:
    _target_: str = f"{PLUGIN}.SlurmLauncher"
    partition: str | None = None
    """--partition."""
    account: str | None = None
    """--account."""
    qos: str | None = None
    """--qos."""
    constraint: str | None = None
    """--constraint."""
    time: str | None = None
    """--time of one attempt in SLURM's format: minutes, or hours:minutes:seconds. A run that needs more is requeued."""
    memory: str | None = None
    """--mem of each node, e.g. 200G."""
    cpus_per_task: int | None = None
    """--cpus-per-task: cores of each rank."""
    ranks_per_node: int = 8
    """Largest number of ranks per node: its GPUs, or on CPU nodes what its cores allow."""
    gres: str | None = None
    """Kind of GPU in --gres, e.g. gpu:h100, without the number. Null: any, with --gpus-per-node."""
    exclusive: bool = False
    """--exclusive."""
    max_concurrent: int | None = None
    """Number of points that run at the same time. Null: no limit."""
    extra: list[str] = field(default_factory=list)
    """More #SBATCH lines, e.g. --mail-type=END."""
    container_image: str | None = None
    """--container-image of srun (pyxis), in which the ranks run."""
    container_mounts: list[str] = field(default_factory=list)
    """--container-mounts of srun, each host:container. The working and sweep directories must be among them."""
    modules: list[str] = field(default_factory=list)
    """Names for `module load`, in this order."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks, over those of the submitting shell. Secret-looking ones aren't written to the script."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before srun."""
    srun: list[str] = field(default_factory=list)
    """More arguments of srun."""
    python: str | None = None
    """Python interpreter of the ranks. Null: the one that submits."""
    signal_seconds: int = 120
    """Seconds before the time limit at which a run is told to save and requeue; more than a step and a save take."""
    requeue: bool = True
    """Whether a run that a signal stopped, or whose node failed, is queued again and continues where it was saved."""
    fetch: bool = True
    """Whether model, tokenizer and data are fetched once before submission; the ranks then run offline."""
    detach: bool = False
    """Whether the command returns after submission instead of waiting for the points."""
    dry_run: bool = False
    """Whether the scripts are printed instead of submitted."""
    poll_seconds: float = 10.0
    """Seconds between two queries of the queue."""


def keys() -> list[str]:
    """All settings' full names."""
    names = {each.name for settings in (LocalSettings, SlurmSettings) for each in fields(settings)}
    return [f"hydra.launcher.{name}" for name in sorted(names)]


def register() -> None:
    """Makes the launchers' settings known to Hydra, once per process."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="local", node=LocalSettings)
    store.store(group="hydra/launcher", name="slurm", node=SlurmSettings)
