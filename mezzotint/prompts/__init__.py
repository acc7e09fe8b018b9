"""Prompts become the conditions of a network, by the pipeline around it: its own tokenizers and text encoders."""
