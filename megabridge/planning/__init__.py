"""Plans of a whole job in one process: every rank's boxes, and its memory."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
