"""What a call costs, and how near two networks are on the same inputs."""
