"""Lists of passes that several recipes share, and the two pipelines with places for further passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mezzotint.compiler.core.pipeline import Pass, Recipe

from ..center_tokens import CenterTokens
from ..channel_scales import ChannelScales
from ..choose_scales import ChooseScales
from ..clean_qdq import CleanQdq
from ..fold_scales import FoldScales
from ..fold_time import FoldTime
from ..freeze_time import FreezeTime
from ..fuse_attention import FuseAttention
from ..group_steps import GroupSteps
from ..insert_qdq import InsertQdq
from ..lower_norms import LowerNorms
from ..lower_transposed import LowerTransposed
from ..normalize import Normalize
from ..observe import Observe
from ..smooth_scales import SmoothScales
from ..split_layers import SplitLayers
from ..step_scales import StepScales

EXACT_FLOAT = (Normalize(), FreezeTime(), SplitLayers(), FuseAttention(), FoldScales(), LowerNorms())
EXACT = (Normalize(), FreezeTime(), LowerTransposed(), SplitLayers(), FuseAttention(), FoldScales(), LowerNorms())
UNFUSED = tuple(replace(step, tokens=None) if isinstance(step, FuseAttention) else step for step in EXACT)
"""EXACT without a float operation for attention: both of its products are integer kernels, however many tokens."""
PORTABLE = (Normalize(), FreezeTime(), LowerTransposed(), FoldScales(), LowerNorms())
"""Exact rewrites into operations that every engine knows."""
FAST = (
    Normalize(),
    FreezeTime(),
    LowerTransposed(),
    FoldTime(),
    SplitLayers(),
    FuseAttention(),
    FoldScales(),
    LowerNorms(),
)
TIMED = (*FAST, Observe(groups=0), ChooseScales())
INTEGER_OPERATIONS = (InsertQdq(lowering="integer"), CleanQdq())
EVERY_CALL = (*TIMED, GroupSteps(method="each"), StepScales(gain=-100.0), *INTEGER_OPERATIONS)
"""A row of scales for each call. Every gain counts, so all activations get tables."""
BY_CHANNEL = Observe(groups=0, channels="inputs")
NOISY = 1.0
"""The eta of claims about the sampler's noise: with eta 0 there is none to reduce."""
ISLANDS = ("first", "second", "penultimate", "last")
SMOOTHED = (
    # A few images show which channels are loud. Only exact places that gain 3 dB: most networks have none.
    Observe(groups=0, channels="inputs", samples=4),
    SmoothScales(gain=3.0, islands=ISLANDS),
)


def against_w8a8(
    name: str, claim: str, paper: str, description: str, passes: tuple[Pass, ...], claim_eta: float = 0.0
) -> Recipe:
    """Return a recipe that its paper compares with w8a8."""
    return Recipe(name, description, passes, paper=paper, baseline="w8a8", claim=claim, claim_eta=claim_eta)


def static(
    *rewrites: Pass,
    plan: Sequence[Pass] = (),
    behind: Sequence[Pass] = (),
    observe: Observe | None = None,
    scales: ChooseScales | None = None,
    exact: Sequence[Pass] = EXACT,
) -> tuple[Pass, ...]:
    """Return the passes of w8a8, with further ones on the float graph, the plan and the quantized graph."""
    measured = (observe or Observe(), scales or ChooseScales())
    return (*exact, *rewrites, *measured, *plan, InsertQdq(), CleanQdq(), *behind)


def stepwise(
    *,
    weight_bits: Literal[4, 6, 8] = 8,
    scales: ChooseScales | None = None,
    rewrites: Sequence[Pass] = (),
    plan: Sequence[Pass] = (),
    behind: Sequence[Pass] = (),
) -> tuple[Pass, ...]:
    """Return the passes of w8a8-steps, with further ones on the float graph, the plan and the quantized graph.

    Ranges of tables are chosen as those of `scales`.
    """
    scales = scales or ChooseScales(weight_bits=weight_bits)
    bits = 8 if scales.activation_bits == "float" else scales.activation_bits
    smoothed = tuple(
        replace(p, weight_bits=weight_bits, activation_bits=bits) if isinstance(p, SmoothScales) else p
        for p in SMOOTHED
    )
    return (
        *FAST,
        CenterTokens(),
        *smoothed,
        *rewrites,
        Observe(groups=0, channels="outputs"),
        scales,
        GroupSteps(),
        StepScales(activations=scales.activations),
        ChannelScales(),
        *plan,
        InsertQdq(islands=ISLANDS, lowering="integer"),
        CleanQdq(),
        *behind,
    )
