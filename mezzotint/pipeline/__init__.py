"""Whole pipelines: a diffusers folder becomes a compiled one, which is loaded and drawn from."""
