"""The graph of a program in torch, with gradients, and what was trained back in the program."""
