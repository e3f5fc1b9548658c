"""Callbacks of the training loop, one class per file. To write your own, subclass `Callback`."""

from megabridge.training.hooks import Callback

__all__ = ["Callback"]
