"""Megatron's checkpoints: saved, loaded under any layout, and never trusted."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
