"""Recipes whose linear layers read rotated channels."""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..choose_levels import ChooseLevels
from ..choose_scales import ChooseScales
from ..normalize_tokens import NormalizeTokens
from ..observe import Observe
from ..rotate_channels import RotateChannels
from ..round_weights import RoundWeights
from ..smooth_scales import SmoothScales
from .parts import BY_CHANNEL, against_w8a8, static

ROTATED = (
    Recipe(
        "quarot",
        "gptq on rotated channels with a scale for each token, found at run time",
        static(RotateChannels(), NormalizeTokens(), behind=(RoundWeights(),)),
        paper="QuaRot, arXiv 2404.00456 (rotations at run time where a norm's factors depend on the timestep; blocks "
        "of 64 channels; queries and keys stay; symmetric ranges of tokens, not cut off)",
        baseline="gptq",
        claim="w4a4",
    ),
    against_w8a8(
        "quantvggt",
        "w4a4",
        "QuantVGGT, arXiv 2509.21302 (its rotation and its smoothing behind it; blocks of 64 channels; without its "
        "filtered calibration)",
        "w8a8 with channels that are rotated, smoothed behind that, and a scale for each token, found at run time",
        static(
            RotateChannels(),
            BY_CHANNEL,
            SmoothScales(run_time=True, run_time_gain=0.1, timed=False),
            NormalizeTokens(),
        ),
    ),
    Recipe(
        "quip-sharp",
        "gptvq on rotated channels: weights of 3 bits, in pairs of inputs, by a table of 64 vectors",
        static(
            RotateChannels(),
            observe=Observe(channels="inputs"),
            scales=ChooseScales(weight_bits=3),
            plan=(ChooseLevels(method="vectors"),),
            behind=(RoundWeights(),),
        ),
        paper="QuIP#, arXiv 2402.04396 (inputs rotated, outputs not; vectors of 2 by k-means, not of 8 from a lattice; "
        "GPTQ in place of its rounding; activations of 8 bits; convolutions as they are)",
        baseline="gptq",
        claim="w3a8",
    ),
    Recipe(
        "pyramid-vq",
        "gptq on rotated channels with weights of 2 bits, four inputs at once rounded to integer points whose "
        "magnitudes sum to 4, 2 or 0",
        static(
            RotateChannels(),
            observe=Observe(channels="inputs"),
            scales=ChooseScales(weight_bits=2),
            plan=(ChooseLevels(method="pyramid", size=4),),
            behind=(RoundWeights(),),
        ),
        paper="Pyramid Vector Quantization for LLMs, arXiv 2410.16926 (groups of 4 inputs; nested pyramids in place of "
        "a magnitude for each group; a scale for each row, by least error; GPTQ by vectors; activations of 8 bits; "
        "convolutions as they are)",
        baseline="ganq",
        claim="w2a8",
    ),
)
