"""Hugging Face folders: safetensors read and written by boxes, codecs, config and tokenizer files, where models come from."""
