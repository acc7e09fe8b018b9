"""A bundle compared with its float model, in pairs of images, with confidence intervals."""
