"""The sampling loop of the compiler, and the statistics of its activations."""
