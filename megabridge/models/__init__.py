"""Models of megatron-core with what Hugging Face's need: provider, layer specs, layers."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
