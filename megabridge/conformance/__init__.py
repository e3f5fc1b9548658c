"""Tools for adding a family: checks of it, a module-by-module comparison with transformers, and a first draft of its file."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
