"""Version of this package. The only place that has it; pyproject.toml reads it from here."""

VERSION = "0.1.0"
