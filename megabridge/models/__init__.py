"""Builds megatron-core models of Hugging Face architectures: the provider, layer specs and layers."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
