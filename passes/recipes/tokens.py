"""Recipes with a scale for each token, found at run time."""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..normalize_tokens import NormalizeTokens
from ..round_weights import RoundWeights
from ..smooth_scales import SmoothScales
from .parts import BY_CHANNEL, ISLANDS, against_w8a8, static, stepwise

SMOOTHED_TOKENS = (BY_CHANNEL, SmoothScales(timed=False), NormalizeTokens())

TOKEN_WISE = (
    Recipe(
        "w8a8-tokens",
        "w8a8-best with a scale for each token that a linear layer reads, found at run time: for transformers, where "
        "it draws the better images and takes more time",
        stepwise(rewrites=(NormalizeTokens(islands=ISLANDS),), behind=(RoundWeights(),)),
        paper="ZeroQuant, arXiv 2206.01861 (token-wise activations); GPTQ, arXiv 2210.17323; TDQ, arXiv 2306.02316",
        baseline="w8a8-best",
        claim="w8a8",
    ),
    against_w8a8(
        "zeroquant",
        "w8a8",
        "ZeroQuant, arXiv 2206.01861 (token-wise activations alone; weights by output channel)",
        "w8a8 with a scale for each token that a linear layer reads, found at run time",
        static(NormalizeTokens()),
    ),
    against_w8a8(
        "vidit-q",
        "w4a8",
        "ViDiT-Q, arXiv 2406.02540 (channels balanced once, not by time range; alpha by expected error; symmetric "
        "ranges of tokens; without its bits by kind of layer)",
        "w8a8 with balanced channels and a scale for each token, found at run time",
        static(*SMOOTHED_TOKENS),
    ),
    Recipe(
        "qqq",
        "gptq with smoothed channels and a scale for each token, found at run time",
        static(*SMOOTHED_TOKENS, behind=(RoundWeights(),)),
        paper="QQQ, arXiv 2406.09904 (alpha by expected error; without its kernel and its groups of weights)",
        baseline="gptq",
        claim="w4a8",
    ),
    against_w8a8(
        "crossquant",
        "w4a8",
        "CrossQuant, arXiv 2410.07505 (the largest numbers of channels are those of the calibration)",
        "w8a8 with activations divided by powers of their tokens' and their channels' largest numbers",
        static(BY_CHANNEL, NormalizeTokens(rows=0.15, columns=0.85)),
    ),
)
