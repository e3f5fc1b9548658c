"""Megatron's checkpoints: saved, loaded under any layout, and never trusted."""
