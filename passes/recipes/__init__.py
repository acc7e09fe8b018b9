"""Named lists of passes, and recipes from files."""
