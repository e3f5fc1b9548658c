"""Layers of the `torch` backend: megatron-core's interfaces, without Transformer Engine, Apex or a GPU."""
