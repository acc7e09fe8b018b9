"""Helpers over onnx-ir graphs, and the file that all graphs keep their weights in. No Program here."""
