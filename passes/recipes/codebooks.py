"""Recipes whose weights are rounded to a codebook: levels on the int8 grid, stored by code.

The papers that store weights in 3 or 4 bits compute in half precision; here the kernels are those of w8a8. Each recipe
has the bits of its paper's claim, and `--set choose_scales.weight_bits` takes 2, 3 and 4.
"""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..choose_levels import ChooseLevels
from ..choose_scales import ChooseScales
from ..observe import Observe
from ..round_weights import RoundWeights
from ..search_formats import SearchFormats
from .parts import against_w8a8, static

_MEASURED = Observe(channels="inputs")
_THREE, _FOUR = ChooseScales(weight_bits=3), ChooseScales(weight_bits=4)

CODEBOOKS = (
    Recipe(
        "ganq",
        "gptq with weights of 3 bits, a table of levels for each output channel, fitted to the layer's output in turns "
        "with the codes",
        static(observe=_MEASURED, scales=_THREE, plan=(ChooseLevels(),), behind=(RoundWeights(refits=4),)),
        paper="GANQ, arXiv 2501.12956 (its table by least squares, in turns with GPTQ's rounding in place of its own; "
        "the first table by k-means; no outliers kept apart)",
        baseline="gptq",
        claim="w3a8",
    ),
    against_w8a8(
        "higgs",
        "w3a8",
        "HIGGS, arXiv 2411.17525 (its grids of one dimension; scales of rows by least error, not by their norm; "
        "without the Hadamard rotation and the allocation of bits)",
        "w8a8 with weights of 3 bits on the levels that are best for normally distributed numbers",
        static(observe=_MEASURED, scales=_THREE, plan=(ChooseLevels(method="normal"),)),
    ),
    against_w8a8(
        "fp4dit",
        "w4a8",
        "FP4DiT, arXiv 2503.15465 (the float format of each weight by its error, not by its place; without its "
        "AdaRound and its float activations for each token)",
        "w8a8 with weights of 4 bits in small float formats, exact on the int8 grid",
        static(observe=_MEASURED, scales=_FOUR, plan=(ChooseLevels(method="float"),)),
    ),
    against_w8a8(
        "lrq-dit",
        "w3a8",
        "LRQ-DiT, arXiv 2508.03485 (its twin logarithmic levels; static activations of 8 bits, not 4; without its "
        "rotations)",
        "w8a8 with weights of 3 bits on two logarithmic grids, one for each sign",
        static(observe=_MEASURED, scales=_THREE, plan=(ChooseLevels(method="log"),)),
    ),
    Recipe(
        "neuqi",
        "gptq with weights of 3 bits on equally spaced levels, with a scale and a zero point for each output channel",
        static(observe=_MEASURED, scales=_THREE, plan=(ChooseLevels(method="affine"),), behind=(RoundWeights(),)),
        paper="NeUQI, arXiv 2505.17595 (scale and zero point by weighted regression from several starts, in place of "
        "its exact search of the zero point; no distillation)",
        baseline="gptq",
        claim="w3a8",
    ),
    against_w8a8(
        "qua2sedimo",
        "w4a8",
        "Qua2SeDiMo, arXiv 2412.14628 (a regression over the layers' own errors in place of its graph network; images "
        "beside the float network's in place of FID; activations of 8 bits)",
        "w8a8 with weights of 3, 4 or 8 bits, on a uniform grid or on levels by k-means, 4 bits on average, found by "
        "images of random configurations and a regression",
        static(observe=_MEASURED, plan=(SearchFormats(),)),
    ),
    against_w8a8(
        "fliqs",
        "w4a8",
        "FLIQS, arXiv 2308.03290 (integers or small floats for each weight; a regression in place of a policy that is "
        "trained with the network; activations of 8 bits)",
        "w8a8 with weights of 3, 4 or 8 bits, integers or small floats, 4 bits on average, found by images of random "
        "configurations and a regression",
        static(observe=_MEASURED, plan=(SearchFormats(formats=("uniform", "float")),)),
    ),
    Recipe(
        "apq",
        "w8a8 with weights of 4 or 8 bits, dense or with up to three quarters of zeros, 4 bits on average, pruned and "
        "rounded against their inputs, found by images of random configurations and a regression",
        static(
            observe=_MEASURED,
            plan=(SearchFormats(widths=(4, 8), formats=("uniform",), sparsities=(0.375, 0.5, 0.625, 0.75)),),
        ),
        paper="APQ, arXiv 2006.08509 (pruning of single weights and widths in one space; the architecture is given; a "
        "regression over the layers' own errors in place of its network, which predicts accuracy; OBS and GPTQ for "
        "each choice)",
        baseline="gptq",
        claim="w4a8",
    ),
    Recipe(
        "gptvq",
        "gptq with weights of 3 bits, rounded in pairs of inputs to a table of 64 vectors for each weight",
        static(observe=_MEASURED, scales=_THREE, plan=(ChooseLevels(method="vectors"),), behind=(RoundWeights(),)),
        paper="GPTVQ, arXiv 2402.15319 (one table for each weight, a scale for each row; its codebook's start and "
        "distance; no update of the table behind the codes, no compression of the table)",
        baseline="gptq",
        claim="w3a8",
    ),
    against_w8a8(
        "vq-t2i",
        "w3a8",
        "Accurate Compression of Text-to-Image Diffusion Models via Vector Quantization, arXiv 2409.00492 (tables by "
        "k-means; not additive, and without its fine-tuning)",
        "w8a8 with weights of 3 bits, rounded in pairs of inputs to the nearest of 64 vectors",
        static(observe=_MEASURED, scales=_THREE, plan=(ChooseLevels(method="vectors"),)),
    ),
)
