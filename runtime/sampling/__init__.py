"""Schedules, solvers, the sampling loop, and the noise it takes back."""
