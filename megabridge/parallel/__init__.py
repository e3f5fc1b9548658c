"""Parallelism: topology of ranks, process groups, and collectives on Python objects."""
