"""Recipes of systems that prune. Their bar is magnitude pruning at the same sparsity, which is a recipe too.

A pruned float model is smaller, and no faster: onnxruntime has no sparse kernel for the CPU.
"""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..choose_scales import ChooseScales
from ..prune_weights import PruneWeights
from ..remove_channels import RemoveChannels
from ..round_weights import RoundWeights
from .parts import EXACT_FLOAT, static

PRUNED = (
    Recipe(
        "magnitude-prune",
        "the float model with the smallest half of each layer's weights removed",
        (*EXACT_FLOAT, PruneWeights(sparsity=0.5, method="magnitude")),
        paper="what OBC, arXiv 2208.11580, is compared with",
    ),
    Recipe(
        "obc-prune",
        "the float model with half of each layer's weights removed one by one, the least error first, and the others "
        "solved again for each row",
        (*EXACT_FLOAT, PruneWeights(sparsity=0.5)),
        paper="OBC, arXiv 2208.11580 (ExactOBS; exact for layers of up to 1500 inputs, in blocks for larger ones; its "
        "budgets by the integer program of assign_bits; no statistics of batch normalization to correct)",
    ),
    Recipe(
        "obc-channels",
        "the float model with a quarter of the channels inside feed-forward networks removed, which makes it faster",
        (*EXACT_FLOAT, RemoveChannels()),
        paper="OBC, arXiv 2208.11580, and ZipLM, arXiv 2302.04089 (the step of both for whole channels; a heap over "
        "all sites in place of ZipLM's table of latencies; no training)",
    ),
    Recipe(
        "obc-compound",
        "w8a8 with 2 of every 4 inputs of a weight removed and the others in 4 bits, both by obc's steps",
        static(
            PruneWeights(pattern="2:4", bits=4),
            scales=ChooseScales(weight_bits=4),
            behind=(RoundWeights(method="obq"),),
        ),
        paper="OBC, arXiv 2208.11580 (2:4 and OBQ, one after the other, as its joint setting)",
    ),
)
