"""Weights rounded against the inputs of their layers."""
