"""Measured effects of quantization that are corrected: biases, means, noise."""
