"""The config: its schema, the checks before anything starts, and their error messages. No torch."""
