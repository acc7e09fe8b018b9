"""Scales from statistics: ranges, weights, and tables over the timestep."""
