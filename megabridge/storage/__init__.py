"""Files and folders: atomic writes, locks, safe opening. No torch."""
