"""What each layer's quantization costs at the output, and what to do about it."""
