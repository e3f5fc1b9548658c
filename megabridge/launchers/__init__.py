"""How ranks start: by us on this host (local.py), or by torchrun or srun (place.py finds ours). No torch."""
