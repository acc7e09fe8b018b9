"""Engines by name: providers of onnxruntime, their plugins, and OpenVINO."""
