"""Factors for each channel, moved between layers without changing the function."""
