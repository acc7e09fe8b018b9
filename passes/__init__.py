"""One file for each pass."""
