"""Where metrics and messages go. Loggers are made on every rank and called on rank 0 only."""

from megabridge.loggers.logger import Logger

__all__ = ["Logger"]
