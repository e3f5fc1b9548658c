"""What happens beside the training loop: one class a file. A callback of your own subclasses `Callback`."""

from megabridge.training.hooks import Callback

__all__ = ["Callback"]
