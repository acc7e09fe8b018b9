"""Widths of layers under a budget, and tables of scales: chosen by the errors that simulated quantizers make."""
