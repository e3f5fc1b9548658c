"""Training and validation data. To write your own, subclass `DataModule` and name the class in `data._target_`."""

from megabridge.data.module import Batch, DataModule

__all__ = ["Batch", "DataModule"]
