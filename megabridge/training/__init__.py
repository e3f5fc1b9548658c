"""The training loop on megatron-core's schedules: optimizer, steps, validation, saves and resume."""

from megabridge.training.hooks import Callback
from megabridge.training.loop import Trainer
from megabridge.training.optimizer import build_optimizer, ddp_settings

__all__ = ["Callback", "Trainer", "build_optimizer", "ddp_settings"]
