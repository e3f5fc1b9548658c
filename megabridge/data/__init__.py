"""Data: what a recipe trains and validates on. Write your own as a subclass of `DataModule`, named by `data._target_`."""

from megabridge.data.module import Batch, DataModule, RowRules

__all__ = ["Batch", "DataModule", "RowRules"]
