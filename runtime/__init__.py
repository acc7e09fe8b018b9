"""What ships: bundles, sessions, and the sampling loop, on numpy and onnxruntime alone."""

__version__ = "0.1.0"
