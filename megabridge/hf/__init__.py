"""Checkpoints on disk: Hugging Face safetensors folders and Megatron's native ones."""
