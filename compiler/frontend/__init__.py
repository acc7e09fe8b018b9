"""A model, from an ONNX file or from torch, becomes a Program."""
