"""Building blocks of family files: config fields and weight rules."""
