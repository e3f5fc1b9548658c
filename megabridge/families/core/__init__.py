"""The vocabulary that family files are written in."""
