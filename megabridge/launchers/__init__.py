"""How ranks start: by us on this host (local.py), or by torchrun or srun, where we find our place (place.py). No torch."""
