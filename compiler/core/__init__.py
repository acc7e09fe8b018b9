"""Program, Pass and Recipe, the pipeline, and its checks between two passes."""
