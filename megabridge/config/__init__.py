"""The config: its schema, what may be refused before anything starts, and what is said of it. No torch."""
