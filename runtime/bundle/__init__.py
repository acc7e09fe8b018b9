"""A bundle on disk: opened, checked, sampled from."""
