"""Files and folders as such: published whole, locked, opened with care. No torch."""
