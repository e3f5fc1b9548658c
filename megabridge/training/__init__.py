"""The training loop on megatron-core's schedules: optimizer, steps, validation, saves and resume."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported

from megabridge.training.hooks import Callback  # noqa: E402
from megabridge.training.loop import Trainer  # noqa: E402
from megabridge.training.optimizer import build_optimizer, ddp_settings  # noqa: E402

__all__ = ["Callback", "Trainer", "build_optimizer", "ddp_settings"]
