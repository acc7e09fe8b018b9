"""The named recipes: lists of passes. The whole pipeline of each is what stands here."""

from __future__ import annotations

from ..compiler.pipeline import Recipe
from .channel_scales import ChannelScales
from .choose_scales import ChooseScales
from .clean_qdq import CleanQdq
from .fit_noise import FitNoise
from .fold_scales import FoldScales
from .fold_time import FoldTime
from .freeze_time import FreezeTime
from .group_steps import GroupSteps
from .insert_qdq import InsertQdq
from .lower_norms import LowerNorms
from .normalize import Normalize
from .observe import Observe
from .settle_scales import SettleScales
from .step_scales import StepScales

EXACT = (Normalize(), FreezeTime(), FoldScales(), LowerNorms())
W8A8 = (*EXACT, Observe(), ChooseScales(), InsertQdq(), CleanQdq())
FAST = (Normalize(), FreezeTime(), FoldTime(), FoldScales(), LowerNorms())
TIMED = (*FAST, Observe(groups=0), ChooseScales())
INTEGER = (InsertQdq(lowering="integer"), CleanQdq())
W8A8_STEPS = (
    *FAST,
    Observe(groups=0, channels="outputs"),
    ChooseScales(),
    GroupSteps(),
    StepScales(),
    ChannelScales(),
    InsertQdq(islands=("first", "second", "penultimate", "last"), lowering="integer"),
    CleanQdq(),
)
TDQ = (*TIMED, GroupSteps(method="each"), StepScales(source="learned"), *INTEGER)
TFMQ = (*TIMED, GroupSteps(method="each"), StepScales(gain=-100.0), *INTEGER)  # no gain is too small: all get tables
PREMUL = (
    *EXACT,
    Observe(groups=0),
    ChooseScales(),
    GroupSteps(),
    StepScales(zero_point="constant"),
    InsertQdq(lowering="premul"),
    CleanQdq(),
)
PCR = (*TIMED, GroupSteps(method="each"), StepScales(), *INTEGER, SettleScales())

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("float", "exact passes only: the float model, faster", EXACT),
        Recipe(
            "w8a8",
            "8-bit weights per output channel and 8-bit activations per tensor, static; time embedding as tables",
            W8A8,
            paper="Q-Diffusion, arXiv 2302.04304 (calibration along the trajectory); TFMQ-DM, arXiv 2311.16503 "
            "(time features from a finite set)",
        ),
        Recipe(
            "w8a8-steps",
            "w8a8 with activation scales that know the timestep, those of what convolutions compute the channel too; "
            "integer operations written directly",
            W8A8_STEPS,
            paper="TDQ, arXiv 2306.02316; TFMQ-DM, arXiv 2311.16503 (ranges of each step, measured directly)",
        ),
        Recipe(
            "w8a8-premul",
            "scales that know the timestep around constant ones, for providers that accept no others",
            PREMUL,
            paper="TDQ, arXiv 2306.02316; TFMQ-DM, arXiv 2311.16503 (ranges of each step, measured directly)",
        ),
        Recipe(
            "tdq",
            "a learned function of the timestep gives each activation that moves its range; one row for every call",
            TDQ,
            paper="TDQ, arXiv 2306.02316 (the network is fitted to measured histograms, not through the model)",
        ),
        Recipe(
            "tfmq",
            "time features cached as tables, and finite set calibration: every activation has a row for every call",
            TFMQ,
            paper="TFMQ-DM, arXiv 2311.16503 (without its reconstruction of the weights)",
        ),
        Recipe(
            "pcr",
            "w8a8-steps with a row for every call, each measured behind the quantized calls before it",
            PCR,
            paper="PCR: progressive calibration (Progressive Calibration and Activation Relaxing, arXiv 2311.06322), "
            "without its 10-bit calls",
        ),
        Recipe(
            "ptqd-w8a8",
            "w8a8, with the sampling loop corrected for the quantization noise",
            (*W8A8, FitNoise()),
            paper="PTQD, arXiv 2305.10657",
        ),
    )
}
DEFAULT = "w8a8-steps"
