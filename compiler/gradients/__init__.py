"""Gradients of the network's prediction as statistics: curvature of rounding errors, traces and relevance of layers."""
