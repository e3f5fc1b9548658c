"""Planning of a whole job in one process: every rank's transfers, and its expected memory."""

from megabridge.platform import prepare

prepare()  # before megatron-core is imported
