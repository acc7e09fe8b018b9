"""Rows of the registry: what a diffusers network of each class takes, and what the exporter needs patched for it."""
