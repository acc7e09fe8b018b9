"""What comes in (models, settings, conditions) and small files and pictures that go out."""
