"""The cost of each layer's quantization at the output, with suggestions."""
