"""The sampling loop runs, and statistics of its activations stream."""
