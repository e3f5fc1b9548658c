"""Native (Megatron) checkpoints: saving, loading under any layout, and safe reading of untrusted files."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
