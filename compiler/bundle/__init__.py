"""A Program is written as a bundle."""
