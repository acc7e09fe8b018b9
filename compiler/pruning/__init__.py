"""Weights removed against the inputs of their layers."""
