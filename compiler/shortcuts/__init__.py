"""Layers that read a concatenation, taken apart."""
