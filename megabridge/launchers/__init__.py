"""Starts ranks: itself on this host (local.py), or as one that torchrun or srun started (rank_environment.py). No torch."""
