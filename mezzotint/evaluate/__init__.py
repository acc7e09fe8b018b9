"""A bundle beside its float model, in pairs of pictures, with intervals."""
