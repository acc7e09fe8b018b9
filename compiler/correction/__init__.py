"""What quantization moved, measured and put back: biases, means, noise."""
