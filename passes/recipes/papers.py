"""Recipes of published systems: each is `w8a8` (or a variant of it) with the one idea of its paper.

What a paper does besides, and what is done differently here, is in the description: a recipe that keeps a system's name
must say what of it is there. Every width is an option (`--set choose_scales.weight_bits=4`).
"""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Pass, Recipe

from ..allocate_steps import AllocateSteps
from ..assign_bits import AssignBits
from ..correct_bias import CorrectBias
from ..correct_softmax import CorrectSoftmax
from ..dilate_weights import DilateWeights
from ..equalize_weights import EqualizeWeights
from ..fit_noise import FitNoise
from ..group_steps import GroupSteps
from ..observe import Observe
from ..reparameterize_norms import ReparameterizeNorms
from ..round_weights import RoundWeights
from ..settle_scales import SettleScales
from ..smooth_scales import SmoothScales
from ..split_shortcuts import SplitShortcuts
from ..step_scales import StepScales
from .parts import EXACT, INTEGER_OPERATIONS, TIMED, static

BY_CHANNEL = Observe(groups=0, channels="inputs")


def _beside_w8a8(name: str, claim: str, paper: str, description: str, passes: tuple[Pass, ...]) -> Recipe:
    return Recipe(name, description, passes, paper=paper, baseline="w8a8", claim=claim)


TIMESTEPS = (
    Recipe(
        "tdq",
        "a learned function of the timestep gives each activation that moves its range; one row for every call",
        (*TIMED, GroupSteps(method="each"), StepScales(source="learned"), *INTEGER_OPERATIONS),
        paper="TDQ, arXiv 2306.02316 (the network is fitted to measured histograms, not through the model)",
        baseline="w8a8",
        claim="w6a6",
    ),
    Recipe(
        "tfmq",
        "time features cached as tables, and finite set calibration: every activation has a row for every call",
        # No gain is too small: all get tables.
        (*TIMED, GroupSteps(method="each"), StepScales(gain=-100.0), *INTEGER_OPERATIONS),
        paper="TFMQ-DM, arXiv 2311.16503 (without its reconstruction of the weights)",
        baseline="w8a8",
        claim="w4a8",
    ),
    Recipe(
        "pcr",
        "w8a8-steps with a row for every call, each measured behind the quantized calls before it",
        (*TIMED, GroupSteps(method="each"), StepScales(), *INTEGER_OPERATIONS, SettleScales()),
        paper="PCR: progressive calibration (Progressive Calibration and Activation Relaxing, arXiv 2311.06322), "
        "without its 10-bit calls",
        baseline="tfmq",
        claim="w8a8",
    ),
    _beside_w8a8(
        "ptqd-w8a8",
        "w8a8",
        "PTQD, arXiv 2305.10657",
        "w8a8, with the sampling loop corrected for the quantization noise, as the paper writes it",
        static(behind=(FitNoise(form="ptqd"),)),
    ),
    _beside_w8a8(
        "d2-dpm",
        "w8a8",
        "D2-DPM (its deterministic form), arXiv 2501.08180",
        "w8a8, with the sampling loop corrected by a regression on the quantized output",
        static(behind=(FitNoise(),)),
    ),
    _beside_w8a8(
        "eda-dm",
        "w4a8",
        "EDA-DM, arXiv 2401.04585 (sample allocation; without its reconstruction, which needs gradients)",
        "calibration on half of the samples, more of them at calls that are like many others, or unlike all",
        (*EXACT, AllocateSteps(method="density"), *static()[len(EXACT) :]),
    ),
)

SHORTCUTS = (
    _beside_w8a8(
        "q-diffusion",
        "w4a8",
        "Q-Diffusion, arXiv 2302.04304 (without its reconstruction, which needs gradients; weights to nearest)",
        "calibration along the trajectory; a layer over a shortcut's concatenation has quantizers for each part",
        static(SplitShortcuts()),
    ),
    _beside_w8a8(
        "segquant",
        "w8a8",
        "SegQuant, arXiv 2507.14811 (input segments; no doubled scales for the signs of an activation, no smoothing)",
        "layers over a concatenation taken apart where that pays, by parts or by powers of two",
        static(SplitShortcuts(method="best")),
    ),
    _beside_w8a8(
        "dmq",
        "w4a8",
        "DMQ, arXiv 2507.12933 (powers of two on skip connections, sought by expected error and not by a vote; without "
        "its learned equivalent scaling)",
        "the parts of a concatenation multiplied by powers of two, the weights that read them divided",
        static(SplitShortcuts(method="powers")),
    ),
)

FACTORS = (
    _beside_w8a8(
        "dfq",
        "w8a8",
        "DFQ, arXiv 1906.04721 (no absorption of biases; means measured, for there is no batch normalization; weights "
        "have a scale per channel, where the paper's need help most with one per tensor)",
        "ranges of the channels between two layers made equal, then the mean error of every layer taken off its bias",
        static(EqualizeWeights(), behind=(CorrectBias(steps="mean"),)),
    ),
    _beside_w8a8(
        "smoothquant",
        "w8a8",
        "SmoothQuant, arXiv 2211.10438 (alpha 0.5; only where the expected error falls)",
        "channels that are hard to quantize shrink, the weights that read them grow; folded, nothing at run time",
        static(BY_CHANNEL, SmoothScales(alphas=0.5, timed=False)),
    ),
    _beside_w8a8(
        "ditas",
        "w4a8",
        "DiTAS, arXiv 2409.07756 (alpha by expected error, activations static; without its low-rank weights)",
        "smoothing by maxima over all steps, alpha sought for each layer, at run time where no fold is exact",
        static(BY_CHANNEL, SmoothScales(run_time=True, run_time_gain=0.1, timed=False)),
    ),
    _beside_w8a8(
        "repq",
        "w6a6",
        "RepQ-ViT, arXiv 2212.08254 (without its logarithmic softmax, for which there is no integer kernel)",
        "what a norm makes is quantized by channel, and the scales and shifts are moved into the norm and the weights",
        static(Observe(channels="inputs"), ReparameterizeNorms()),
    ),
    _beside_w8a8(
        "dilate",
        "w4a8",
        "DilateQuant, arXiv 2409.14307 (weight dilation only; without its training)",
        "columns of weights grow until they reach their row's range, at run time where no fold is exact",
        static(BY_CHANNEL, DilateWeights(run_time=True, run_time_gain=0.1, timed=False)),
    ),
)

ROUNDING = (
    _beside_w8a8(
        "obc",
        "w4a8",
        "OBC, arXiv 2208.11580 (its quantizer OBQ for layers of up to 320 inputs, GPTQ for larger ones)",
        "w8a8 with weights rounded one after the other, the least harm first, the rest making up for it",
        static(behind=(RoundWeights(method="obq"),)),
    ),
    _beside_w8a8(
        "gptq",
        "w4a8",
        "GPTQ, arXiv 2210.17323 (convolutions unfolded; calls balanced)",
        "w8a8 with weights rounded column by column, those that follow making up for the error",
        static(behind=(RoundWeights(),)),
    ),
    _beside_w8a8(
        "gptaq",
        "w4a8",
        "GPTAQ, arXiv 2504.02692 (its correction as a least-squares target)",
        "gptq whose layers also undo what quantization did to their inputs",
        static(behind=(RoundWeights(method="gptaq"),)),
    ),
    _beside_w8a8(
        "comq",
        "w4a8",
        "COMQ, arXiv 2403.07134 (one order of columns for all rows)",
        "w8a8 with weights rounded by coordinate descent",
        static(behind=(RoundWeights(method="comq"),)),
    ),
    _beside_w8a8(
        "softmax-bias",
        "w8a8",
        "Softmax Bias Correction for Quantized Generative Models, arXiv 2309.01729 (added behind the value matmul)",
        "attention gets back the probability that rounding takes from every row",
        static(behind=(CorrectSoftmax(),)),
    ),
)

BITS = (
    _beside_w8a8(
        "mixdq",
        "w4a8",
        "MixDQ, arXiv 2405.17873 (no token of its own for the text's beginning; no activations in half precision)",
        "2, 4 or 8 bits for each layer, 4 on average, by an integer program; convolutions and matmuls judged apart",
        static(plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), score="mixdq"),)),
    ),
    _beside_w8a8(
        "mpq-dm",
        "w4a8",
        "MPQ-DM, arXiv 2412.11549 (channels by kurtosis; widths by an integer program, not one bit more or less; no "
        "smoothing, no distillation)",
        "2, 4 or 8 bits for each tenth of a layer's output channels, 4 on average",
        static(plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), parts=10, order="kurtosis"),)),
    ),
    _beside_w8a8(
        "hawq",
        "w4a8",
        "HAWQ-V2 and HAWQ-V3, arXiv 1911.03852 and 2011.10680 (Gauss-Newton traces of epsilon's error; probes without "
        "gradients)",
        "2, 4 or 8 bits for each layer, 4 on average, by the trace of its Hessian, by an integer program",
        static(plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), score="hawq"),)),
    ),
)

PAPERS = (*TIMESTEPS, *SHORTCUTS, *FACTORS, *ROUNDING, *BITS)
