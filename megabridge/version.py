"""The version of this package. The only place that states it; pyproject.toml reads it here."""

VERSION = "0.1.0"
