"""From a model to a bundle: a Program, what is measured and decided about it, and how it is written."""
