"""Program, Pass and Recipe, the pipeline, and what it checks between two passes."""
