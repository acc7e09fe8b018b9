"""Recipes of systems that weight rounding errors by gradients of the network's prediction.

Their papers are about language models and take the gradients of a cross entropy. Here they are those of random
projections of epsilon, whose products have the Gauss-Newton matrix of its error as their mean
(compiler/gradients/probed_network.py). All start from gptq, as their papers do, with weights of 2 to 4 bits. `aespa`
takes what attention computes in place of gradients.
"""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..round_weights import RoundWeights
from .parts import static

GRADIENTS = (
    Recipe(
        "guidedquant",
        "gptq with inputs of layers weighted by gradients of epsilon, with a matrix for each quarter of the output "
        "channels",
        static(behind=(RoundWeights(weighting="guided"),)),
        paper="GuidedQuant, arXiv 2505.07004 (its objective in GPTQ; one random projection of epsilon for each batch "
        "in place of the gradient of a cross entropy; without its own solver for levels)",
        baseline="gptq",
        claim="w4a8",
    ),
    Recipe(
        "oac",
        "gptq against the products of gradients of epsilon by the weights, sample by sample",
        static(behind=(RoundWeights(weighting="oac"),)),
        paper="OAC, arXiv 2405.15025 (its Hessian in GPTQ, where the paper uses SpQR and BiLLM; one random projection "
        "of epsilon for each batch in place of the gradient of a cross entropy)",
        baseline="gptq",
        claim="w4a8",
    ),
    Recipe(
        "yaqa",
        "gptq with feedback of rounding errors between output channels as well, by gradients of epsilon",
        static(behind=(RoundWeights(weighting="yaqa"),)),
        paper="YAQA, arXiv 2505.22988 (its sketch B with one projection of epsilon for each batch; uniform levels, "
        "without its incoherence processing)",
        baseline="gptq",
        claim="w4a8",
    ),
    Recipe(
        "aespa",
        "gptq in which errors of queries, keys and values count by what attention makes of them",
        static(behind=(RoundWeights(weighting="scores"),)),
        paper="aespa, arXiv 2402.08958 (its objectives of queries, keys and values, in GPTQ with feedback along both "
        "sides in place of learned rounding; projections that a norm or a rotation follows keep their own H)",
        baseline="gptq",
        claim="w4a8",
    ),
)
