"""The `torch` backend: megatron-core layers that need neither Transformer Engine nor Apex, nor a GPU."""
