"""The named recipes: lists of passes. Those of papers are in papers.py, shared parts in parts.py."""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Pass, Recipe

from ..assign_bits import AssignBits
from ..center_tokens import CenterTokens
from ..choose_scales import ChooseScales
from ..clean_qdq import CleanQdq
from ..group_steps import GroupSteps
from ..insert_qdq import InsertQdq
from ..observe import Observe
from ..round_weights import RoundWeights
from ..step_scales import StepScales
from ..store_half import StoreHalf
from .distilled import NARROW_WIDTHS
from .papers import PAPERS
from .parts import EXACT_FLOAT, ISLANDS, PORTABLE, SMOOTHED, static, stepwise

CONSTANT = "w8a8-constant"
CONSTANT_SCALES = (
    *PORTABLE,
    CenterTokens(),
    *SMOOTHED,
    Observe(groups=0),
    ChooseScales(symmetric="products"),
    GroupSteps(),
    StepScales(zero_point="constant", decide="held_out", islands=ISLANDS),
    InsertQdq(islands=ISLANDS, lowering="constant"),
    CleanQdq(),
    RoundWeights(),
)


def four_bits(rounding: RoundWeights) -> tuple[Pass, ...]:
    """Return the passes of w4a8 with this rounding of weights."""
    mixed = AssignBits(mean_bits=4.15, parts=10, islands=ISLANDS)
    return stepwise(weight_bits=4, plan=(mixed,), behind=(rounding, StoreHalf(scales=True)))


OURS = (
    Recipe("float", "the float model, faster: exact rewrites only", EXACT_FLOAT),
    Recipe(
        "w8a8",
        "static 8-bit weights per output channel and 8-bit activations per tensor; the time embedding as tables",
        static(),
        paper="Q-Diffusion, arXiv 2302.04304 (calibration along the trajectory); TFMQ-DM, arXiv 2311.16503 "
        "(time features from a finite set)",
    ),
    Recipe(
        "w8a8-steps",
        "w8a8 with activation scales that depend on the timestep, and for outputs of convolutions on the channel too; "
        "channels far louder than the others are smoothed; integer operations written directly",
        stepwise(),
        paper="TDQ, arXiv 2306.02316; TFMQ-DM, arXiv 2311.16503 (ranges of each step, measured directly)",
        baseline="w8a8",
        claim="w8a8",
    ),
    Recipe(
        CONSTANT,
        "w8a8-best in the form of OpenVINO, TensorRT and other engines: constant scales on the inputs of layers; "
        "activations whose range moves far with the timestep are multiplied by a gathered factor",
        CONSTANT_SCALES,
        paper="GPTQ, arXiv 2210.17323; TDQ, arXiv 2306.02316; TFMQ-DM, arXiv 2311.16503",
        baseline="w8a8",
        claim="w8a8",
        target="portable",
    ),
    Recipe(
        "w8a8-best",
        "w8a8-steps with weights rounded against their inputs (GPTQ), which draws the better images: rounding to "
        "nearest leaves the same error at every call, and it adds up along the trajectory",
        stepwise(behind=(RoundWeights(),)),
        paper="GPTQ, arXiv 2210.17323; TDQ, arXiv 2306.02316; TFMQ-DM, arXiv 2311.16503",
        baseline="w8a8-steps",
        claim="w8a8",
    ),
    Recipe(
        "w4a8",
        "w8a8-steps with weights of 4 bits, stored in half a byte each, and of 8 bits for the few channels that need "
        "them, rounded against their inputs (GPTQ)",
        four_bits(RoundWeights()),
        paper="GPTQ, arXiv 2210.17323; HAWQ-V3, arXiv 2011.10680 (integer program); MPQ-DM, arXiv 2412.11549 (widths "
        "by channel); TDQ, arXiv 2306.02316",
        baseline="w8a8-steps",
        claim="w4a8",
    ),
    Recipe(
        "w4a8-yaqa",
        "w4a8 with feedback of rounding errors between output channels as well, by gradients of epsilon, which needs "
        "torch",
        four_bits(RoundWeights(weighting="yaqa")),
        paper="YAQA, arXiv 2505.22988, with the recipe w4a8 around it",
        baseline="w4a8",
        claim="w4a8",
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*OURS, *NARROW_WIDTHS, *PAPERS)}
DEFAULT = "w8a8-best"
