"""Pieces of work on several processes or machines, by Ray: the same bytes as in one process."""
