"""Loggers of metrics and messages. They are made on every rank and called on rank 0 only."""

from megabridge.loggers.logger import Logger
from megabridge.loggers.reporter import Reporter

__all__ = ["Logger", "Reporter"]
