"""Silences warnings of megatron-core and torch that users can't act on. Each is listed with its reason and its text: other texts,
as of newer versions, are not silenced. Importing this module silences nothing; `install` does."""

from __future__ import annotations

import logging
import warnings
from typing import Final, override

# (start of the message as a regular expression, category)
_WARNINGS: Final[tuple[tuple[str, type[Warning]], ...]] = (
    # Apex and Transformer Engine are optional: the torch backend uses neither.
    (r"Apex is not installed", UserWarning),
    (r"Transformer Engine and Apex are not installed", UserWarning),
    (r"absl\.logging is not installed", UserWarning),
    # A provider is finalized before any rank exists, to plan for instance.
    (r"Could not determine rank from torch\.distributed", UserWarning),
    # megatron-core imports its own deprecated module while it is imported.
    (r"The following imports from `dynamic_context\.py`", DeprecationWarning),
    # Imported with megatron-core's models, never used here.
    (r"MimoModelConfig is experimental", UserWarning),
    # Every tensor operation passes through the CPU redirection, which reads no gradients itself.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    # Names that megatron-core uses, renamed in newer versions of torch.
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", FutureWarning),
    # A native checkpoint is read without torch's collectives, and megatron-core describes it with torch's older class.
    (r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    # megatron-core's source has an invalid escape in a docstring; shown once, when it is compiled to bytecode.
    (r"invalid escape sequence", SyntaxWarning),
    (r'"\\-" is an invalid escape sequence', SyntaxWarning),
)

# (logger, start of the message): records that are dropped
_RECORDS: Final[tuple[tuple[str, str], ...]] = (
    # 0.19 still maintains GPTModel; HybridModel has other parameter names, which no tool reads yet.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    # It asks callers for a layout that it computes itself anyway.
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    # A synchronous save uses the same function, which advises another package for asynchronous ones.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
    # Printed when CUDA_HOME is set on a host without a CUDA device.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)


class _Drop(logging.Filter):
    """Drops the records of one logger that start with `start`."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def drop(logger: str, start: str) -> None:
    """Drops records of `logger` whose message starts with `start`."""
    logging.getLogger(logger).addFilter(_Drop(start))


def install() -> None:
    """Silences the warnings listed above, for this process and its forks."""
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for logger, start in _RECORDS:
        drop(logger, start)
