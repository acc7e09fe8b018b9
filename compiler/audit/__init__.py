"""What onnxruntime made of a file: its kernels, and why a group has none."""
