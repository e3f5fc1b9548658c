"""Models of megatron-core with what Hugging Face's need: provider, layer specs, layers."""
