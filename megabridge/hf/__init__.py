"""Hugging Face folders: safetensors read and written by boxes, codecs of quantised weights, config and tokenizer files, the hub."""
