"""How ranks start: by us on this host (local.py), or by torchrun or srun (rank_environment.py finds ours). No torch."""
