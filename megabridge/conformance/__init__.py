"""Tools for whoever adds a family: a battery of checks, a comparison module by module, and a first draft of the file."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
