"""The `torch` backend: megatron-core layers that need neither Transformer Engine nor Apex, nor a GPU."""

import megabridge.platform  # noqa: F401  before megatron: it decides what megatron-core's import finds
