"""Recipes of published systems: each is `w8a8` (or a variant of it) with the one idea of its paper.

`paper` says which parts of the paper are left out or different here: a recipe with a system's name must state how much
of the system it has. Every width is an option (`--set choose_scales.weight_bits=4`).
"""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..assign_bits import AssignBits
from ..evolve_scales import EvolveScales
from ..fit_noise import FitNoise
from ..group_steps import GroupSteps
from ..learn_scales import LearnScales
from ..observe import Observe
from ..round_scales import RoundScales
from ..round_weights import RoundWeights
from ..settle_scales import SettleScales
from ..share_bits import ShareBits
from ..smooth_scales import SmoothScales
from ..split_shortcuts import SplitShortcuts
from ..step_scales import StepScales
from .attention import ATTENTION
from .codebooks import CODEBOOKS
from .distilled import DISTILLED
from .factors import FACTORS, TENSOR
from .gradients import GRADIENTS
from .low_rank import LOW_RANK
from .parts import BY_CHANNEL, EVERY_CALL, INTEGER_OPERATIONS, NOISY, TIMED, against_w8a8, static
from .pruned import PRUNED
from .rotated import ROTATED
from .tokens import TOKEN_WISE
from .trained import TRAINED

BASELINES = (
    Recipe(
        "w8a8-time",
        "w8a8 with a time embedding that is computed and quantized like all other layers, not stored as tables",
        tuple(step for step in static() if step.name != "freeze_time"),
        paper="what TFMQ-DM, arXiv 2311.16503, is compared with",
    ),
    Recipe(
        "w8a8-tensor",
        "w8a8 with one scale for each weight, not one for each of its output channels",
        static(scales=TENSOR),
        paper="what DFQ, arXiv 1906.04721, is compared with",
    ),
    Recipe(
        "w8a8-calls",
        "w8a8 with a row of scales for each activation and network call",
        EVERY_CALL,
        paper="what PCR, arXiv 2311.06322, is compared with; the finite set calibration of TFMQ-DM, arXiv 2311.16503",
    ),
)
"""Where papers start from: w8a8 with a loss that their method repairs."""

TIMESTEPS = (
    Recipe(
        "tdq",
        "ranges of activations learned through the network as a function of the timestep, where they depend on it; one "
        "row for each call",
        (
            *TIMED,
            GroupSteps(method="each"),
            StepScales(source="learned"),
            *INTEGER_OPERATIONS,
            LearnScales(through="network", form="network", held_out=0),
        ),
        paper="TDQ, arXiv 2306.02316 (its networks are fitted to measured histograms first, and have both ends of a "
        "range; no dropout; scales that do not depend on the timestep are learned beside them; weights rounded to "
        "nearest, as in its quantization after training)",
        baseline="w8a8",
        claim="w6a6",
    ),
    Recipe(
        "pcr",
        "w8a8-calls with scales that are measured behind the quantized calls before",
        (*EVERY_CALL, SettleScales()),
        paper="PCR: progressive calibration (Progressive Calibration and Activation Relaxing, arXiv 2311.06322), "
        "without its 10-bit calls",
        baseline="w8a8-calls",
        claim="w8a8",
    ),
    against_w8a8(
        "ptqd-w8a8",
        "w4a8",
        "PTQD, arXiv 2305.10657 (its three corrections alone, at every call, in the closed forms of the paper; the "
        "whole system is `ptqd`)",
        "w8a8 with a sampling loop that corrects the quantization noise as the paper writes it, helpful or not",
        static(behind=(FitNoise(form="ptqd", gate=False),)),
        claim_eta=NOISY,
    ),
    against_w8a8(
        "ptqd-gated",
        "w4a8",
        "PTQD, arXiv 2305.10657, and a choice of ours on images from noise that the fit did not see",
        "ptqd-w8a8 with only those terms that bring images nearer to the float network's",
        static(behind=(FitNoise(form="ptqd"),)),
        claim_eta=NOISY,
    ),
    against_w8a8(
        "d2-dpm",
        "w8a8",
        "D2-DPM, arXiv 2501.08180 (its deterministic form at every call; means for each channel, and no values dropped "
        "as outliers)",
        "w8a8 with a sampling loop that replaces each prediction by its regression on the quantized output",
        static(behind=(FitNoise(gate=False, noise=False),)),
    ),
    against_w8a8(
        "d2-dpm-gated",
        "w8a8",
        "D2-DPM, arXiv 2501.08180, PTQD's reduced sampler noise, arXiv 2305.10657, and a choice of ours on images from "
        "noise that the fit did not see",
        "d2-dpm with less noise of the sampler, and only those terms that bring images nearer to the float network's",
        static(behind=(FitNoise(),)),
        claim_eta=NOISY,
    ),
)

SHORTCUTS = (
    against_w8a8(
        "segquant",
        "w8a8",
        "SegQuant, arXiv 2507.14811 (input segments; without its scales for the two signs of an activation and its "
        "smoothing)",
        "w8a8 with layers over a concatenation split into parts, or their parts scaled by powers of two, where that "
        "pays",
        static(SplitShortcuts(method="best")),
    ),
    against_w8a8(
        "dmq",
        "w4a8",
        "DMQ, arXiv 2507.12933 (powers of two for the channels of skip connections, chosen by expected error and not "
        "by a vote; without its learned equivalent scaling)",
        "w8a8 with the channels of a concatenation divided by powers of two, and the weights that read them multiplied",
        static(SplitShortcuts(method="powers")),
    ),
)

ROUNDING = (
    against_w8a8(
        "obc",
        "w4a8",
        "OBC, arXiv 2208.11580 (its quantizer OBQ: exact for layers of up to 320 inputs; in blocks of 320, with all "
        "later columns free, for larger ones)",
        "w8a8 with weights rounded one by one, the least error first, the remaining ones compensating for it",
        static(behind=(RoundWeights(method="obq"),)),
    ),
    against_w8a8(
        "gptq",
        "w4a8",
        "GPTQ, arXiv 2210.17323 (convolutions unfolded; calls balanced)",
        "w8a8 with weights rounded column by column, the following columns compensating for the error",
        static(behind=(RoundWeights(),)),
    ),
    Recipe(
        "gptaq",
        "gptq with layers that also compensate for the quantization error of their inputs",
        static(behind=(RoundWeights(method="gptaq"),)),
        paper="GPTAQ, arXiv 2504.02692 (its correction as a least-squares target)",
        baseline="gptq",
        claim="w4a8",
    ),
    against_w8a8(
        "comq",
        "w4a8",
        "COMQ, arXiv 2403.07134 (one order of columns for all rows)",
        "w8a8 with weights rounded by coordinate descent",
        static(behind=(RoundWeights(method="comq"),)),
    ),
    against_w8a8(
        "gpfq",
        "w4a8",
        "GPFQ, arXiv 2201.11113 (one scale for each output channel; the inputs of the quantized graph on both sides)",
        "w8a8 with weights rounded in one sweep, each to what the columns before it left of the output",
        static(behind=(RoundWeights(method="comq", sweeps=1, act_order=False),)),
    ),
    against_w8a8(
        "requant",
        "w4a8",
        "REQuant, arXiv 2510.04044 (29 shares of the largest magnitude in place of its convex search; errors by the "
        "diagonal of H)",
        "w8a8 with the range of each output channel of a weight searched by the error of the layer's output",
        static(behind=(RoundWeights(method="nearest", scales="output"),)),
    ),
)

SCALES = (
    against_w8a8(
        "evol-q",
        "w4a8",
        "Evol-Q, arXiv 2308.10814 (one factor for all rows of a weight; squared errors in place of its contrastive "
        "loss; activations keep their scales; images of other noise judge)",
        "w8a8 with scales of weights found by an evolution of small changes against the float network's predictions",
        static(behind=(EvolveScales(),)),
    ),
    against_w8a8(
        "lsq",
        "w4a4",
        "LSQ, arXiv 1902.08153 (zero points are learned too; the float network's output in place of labels; 300 steps "
        "of 8 samples)",
        "w8a8 with weights and all scales trained through the network against the float network's output",
        static(behind=(LearnScales(what="both", through="network", weight_steps=3e-3, held_out=0),)),
    ),
)

BITS = (
    against_w8a8(
        "mixdq",
        "w4a8",
        "MixDQ, arXiv 2405.17873 (without its separate first text token; no activations in half precision)",
        "2, 4 or 8 bits for each layer, 4 on average, by an integer program; cross-attention and feed-forward are "
        "scored by images, all others by the error of epsilon",
        static(plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), score="mixdq"),)),
    ),
    against_w8a8(
        "hawq",
        "w4a8",
        "HAWQ-V2 and HAWQ-V3, arXiv 1911.03852 and 2011.10680 (Gauss-Newton traces of epsilon's error, to 10 % by "
        "random projections; without training behind it)",
        "2, 4 or 8 bits for each layer, 4 on average, by an integer program over the traces of their Hessians",
        static(plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), score="hawq"),)),
    ),
    against_w8a8(
        "lrp-qvit",
        "w4a8",
        "LRP-QViT, arXiv 2401.11243 (its scores for all layers of a denoiser, times the relative error of the rounded "
        "weights, in an integer program; activations keep 8 bits; without its clipped normalizations)",
        "2, 4 or 8 bits for each layer, 4 on average, by an integer program over the relevance of their outputs",
        static(plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), score="lrp"),)),
    ),
    against_w8a8(
        "efficient-ldm",
        "w4a8",
        "Efficient Quantization Strategies for Latent Diffusion Models, arXiv 2312.05431 (layers, not blocks, by SQNR, "
        "and an integer program over them; smoothing by expected error)",
        "w8a8 with 4 or 8 bits for each layer, 5 on average, by the SQNR of epsilon, and smoothed, at run time where "
        "no exact place exists",
        static(
            BY_CHANNEL,
            SmoothScales(run_time=True, run_time_gain=0.1, timed=False),
            plan=(AssignBits(mean_bits=5.0),),
        ),
    ),
    Recipe(
        "hawq-v3",
        "hawq with scales that are integers of 8 bits times powers of two",
        static(plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), score="hawq"), RoundScales())),
        paper="HAWQ-V3, arXiv 2011.10680 (its dyadic scales, each rounded by itself; onnxruntime multiplies by them in "
        "float, so nothing is faster; no training)",
        baseline="hawq",
        claim="w4a8",
    ),
    Recipe(
        "baq",
        "gptq with 2 to 8 bits for each layer, 4 on average, so that all weights err equally",
        static(observe=Observe(channels="inputs"), plan=(ShareBits(),), behind=(RoundWeights(),)),
        paper="BAQ, arXiv 2506.05664 (bits for layers, not for the columns of a weight; errors by the diagonal of H)",
        baseline="gptq",
        claim="w4a8",
    ),
    Recipe(
        "layer-wise",
        "gptq with 8 bits for the layers with the most weights far above their mean, 2 for the others, 4 on average",
        static(plan=(ShareBits(widths=(2, 8), method="outliers"),), behind=(RoundWeights(),)),
        paper="Layer-Wise Quantization, arXiv 2406.17415 (its score by outliers; the layers by an integer program; not "
        "its score by how far a layer turns its input)",
        baseline="gptq",
        claim="w4a8",
    ),
)

PAPERS = (
    *(*BASELINES, *TIMESTEPS, *SHORTCUTS, *FACTORS, *ROUNDING),
    *(*PRUNED, *CODEBOOKS, *LOW_RANK, *TOKEN_WISE, *ROTATED, *GRADIENTS),
    *(*ATTENTION, *TRAINED, *SCALES, *BITS, *DISTILLED),
)
