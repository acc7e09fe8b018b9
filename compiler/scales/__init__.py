"""From statistics to scales: ranges, weights, and tables over the timestep."""
