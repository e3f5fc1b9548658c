"""The conversion engine: one plan, and the read and write loops over it that import, export and verify."""
