"""Import of a model, from an ONNX file or from torch, as a Program."""
