"""Helpers over onnx-ir graphs, and the file of their weights. Nothing here knows Program."""
