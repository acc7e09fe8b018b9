"""Recipes of systems that keep a part of low rank of each weight in float, or the error of rounding as a layer.

The branches are islands: onnxruntime runs them in float beside the integer layers, which costs time that the papers'
fused kernels do not (`mezzotint bench` prints it). Widths are those of the papers' claims; what a share of the values
of a weight costs the file is `split_ranks.share` times 16 bits.
"""

from __future__ import annotations

from dataclasses import replace

from mezzotint.compiler.core.pipeline import Recipe

from ..choose_scales import ChooseScales
from ..correct_bias import CorrectBias
from ..expand_weights import ExpandWeights
from ..round_weights import RoundWeights
from ..smooth_scales import SmoothScales
from ..split_ranks import SplitRanks
from .parts import BY_CHANNEL, against_w8a8, static

_FOUR = ChooseScales(weight_bits=4)

LOW_RANK = (
    Recipe(
        "svdquant",
        "gptq on smoothed layers with weights of 4 bits, whose largest part of low rank stays in float beside them",
        static(
            BY_CHANNEL,
            SmoothScales(weight_bits=4, run_time=True, run_time_gain=0.1, timed=False),
            SplitRanks(weighting="none"),
            scales=_FOUR,
            behind=(RoundWeights(),),
        ),
        paper="SVDQuant, arXiv 2411.05007 (rank 32 at most, and 5 % of a weight's values, since layers are small here; "
        "one scale for an output channel, and static ones for activations, where it has groups of 64; smoothing by "
        "expected error; a branch of layers of its own, in no fused kernel; the first and the last layer in float)",
        baseline="gptq",
        claim="w4a4",
    ),
    against_w8a8(
        "rex",
        "w4a8",
        "REx, arXiv 2203.14645 (two terms for all output channels, where it may leave out those that err least)",
        "w8a8 with weights of 4 bits, and what their rounding takes as a second integer layer of 4 bits",
        static(ExpandWeights(weights="minmax"), scales=replace(_FOUR, weights="minmax")),
    ),
    against_w8a8(
        "quantvsr",
        "w4a4",
        "QuantVSR, arXiv 2508.04485 (ranks by a layer's error in epsilon, not by the complexity of frames; "
        "the means of biases measured, not learned; without its training of both branches and its rotation)",
        "w8a8 with weights of 4 bits and float branches of low rank, whose ranks one program shares out among the "
        "layers; biases corrected by the mean error of their layer",
        static(
            SplitRanks(spread="errors"),
            scales=_FOUR,
            behind=(CorrectBias(steps="mean", held_out=0),),
        ),
    ),
    Recipe(
        "mlorq",
        "gptq with 2, 4 or 8 bits for each layer and a float branch of low rank beside it, 4 bits for each weight "
        "with the branch, by one integer program",
        static(
            SplitRanks(mean_bits=4.0, rounding="gptq"),
            scales=_FOUR,
            behind=(RoundWeights(),),
        ),
        paper="MLoRQ, arXiv 2507.09616 (a float branch of low rank beside a residual, where it has factors of low "
        "rank, quantized, in place of the weight; GPTQ in place of its adaptive rounding)",
        baseline="gptq",
        claim="w4a8",
    ),
    Recipe(
        "int21",
        "gptq with weights of 2 bits and float branches of low rank that make up for their rounding",
        static(
            SplitRanks(weight_bits=2, rounding="gptq", iterations=10),
            scales=ChooseScales(weight_bits=2),
            behind=(RoundWeights(),),
        ),
        paper="INT2.1, arXiv 2306.08162 (branches by least squares of the layers' outputs, in place of adapters that "
        "are trained)",
        baseline="gptq",
        claim="w2a8",
    ),
)
