"""The quantized graph in the form that a target runs on integers."""
