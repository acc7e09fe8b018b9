"""A width for each layer under a budget."""
