"""The cost of one network call, and the fidelity of one network to another on the same inputs."""
