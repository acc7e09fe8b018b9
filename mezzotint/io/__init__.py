"""Input (models, settings, conditions) and output (small files, images)."""
