"""The engine: one plan, and the walks over it that import, export and verify."""
