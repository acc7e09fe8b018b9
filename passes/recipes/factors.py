"""Recipes that move factors and summands of channels between layers: the function stays, and the ranges change."""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..choose_scales import ChooseScales
from ..correct_bias import CorrectBias
from ..dilate_weights import DilateWeights
from ..equalize_weights import EqualizeWeights
from ..observe import Observe
from ..reparameterize_norms import ReparameterizeNorms
from ..shift_inputs import ShiftInputs
from ..smooth_scales import SmoothScales
from ..split_ranks import SplitRanks
from .parts import BY_CHANNEL, against_w8a8, static

TENSOR = ChooseScales(per_channel=False)

FACTORS = (
    Recipe(
        "dfq",
        "w8a8-tensor with equal ranges of the channels between two layers, and biases corrected by the mean error of "
        "their layer",
        static(EqualizeWeights(), scales=TENSOR, behind=(CorrectBias(steps="mean"),)),
        paper="DFQ, arXiv 1906.04721 (one scale for each weight; no absorption of biases; means are measured, since "
        "there is no batch normalization)",
        baseline="w8a8-tensor",
        claim="w8a8",
    ),
    against_w8a8(
        "smoothquant",
        "w8a8",
        "SmoothQuant, arXiv 2211.10438 (alpha 0.5; only where the expected error falls)",
        "w8a8 with smaller loud channels and larger weights that read them; exact in the weights, no cost at run time",
        static(BY_CHANNEL, SmoothScales(alphas=0.5, timed=False)),
    ),
    against_w8a8(
        "ditas",
        "w4a8",
        "DiTAS, arXiv 2409.07756 (alpha by expected error, static activation scales; branches of rank 32 at most, and "
        "5 % of a weight's values, where layers are small)",
        "w8a8 smoothed by maxima over all steps, alpha chosen for each layer, at run time where no exact place exists; "
        "a float branch of low rank takes what the rounding of a weight leaves",
        static(
            BY_CHANNEL,
            SmoothScales(run_time=True, run_time_gain=0.1, timed=False),
            SplitRanks(weighting="inputs", weight_bits=8, iterations=10),
        ),
    ),
    against_w8a8(
        "repq",
        "w6a6",
        "RepQ-ViT, arXiv 2212.08254 (without its logarithmic softmax, which `repq-vit` has)",
        "w8a8 with a quantizer for each channel behind norms, its scales and shifts moved into the norm and the "
        "weights",
        static(Observe(channels="inputs"), ReparameterizeNorms()),
    ),
    against_w8a8(
        "fptq",
        "w4a8",
        "FPTQ, arXiv 2308.15987 (its logarithmic equalization, where the expected error falls; no groups of inputs, "
        "and no tokens with scales of their own)",
        "w8a8 with loud channels brought down to their logarithm, and larger weights that read them",
        static(BY_CHANNEL, SmoothScales(form="log", weight_bits=4, timed=False)),
    ),
    against_w8a8(
        "aweq",
        "w8a8",
        "AWEQ, arXiv 2311.01305 (products of ranges, channel by channel; biases by the mean error of their layer)",
        "smoothquant where any decibel is gained, and biases corrected by the mean error of their layer",
        static(BY_CHANNEL, SmoothScales(alphas=0.5, timed=False), behind=(CorrectBias(steps="mean", held_out=0),)),
    ),
    against_w8a8(
        "noisyquant",
        "w6a6",
        "NoisyQuant, arXiv 2211.16056 (where a norm or a layer makes the input, its constants take the noise; the "
        "amplitude by the expected error of the layer)",
        "w8a8 with a constant noise added to the inputs of linear layers, and taken off their biases",
        static(BY_CHANNEL, ShiftInputs(method="noise")),
    ),
    against_w8a8(
        "mptq-vit",
        "w6a6",
        "MPTQ-ViT, arXiv 2401.14895 (smoothing with a bias term; alpha by expected error; one width for all layers, "
        "without its ranges for the output of softmax and GELU)",
        "w8a8 with the channels of linear layers' inputs brought around zero and smoothed",
        static(BY_CHANNEL, ShiftInputs(), BY_CHANNEL, SmoothScales(timed=False)),
    ),
    against_w8a8(
        "dilate",
        "w4a8",
        "DilateQuant, arXiv 2409.14307 (weight dilation only; without its training)",
        "w8a8 with weight columns enlarged to the range of their rows, at run time where no exact place exists",
        static(BY_CHANNEL, DilateWeights(run_time=True, run_time_gain=0.1, timed=False)),
    ),
)
