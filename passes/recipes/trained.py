"""Recipes of systems that train: the rounding of weights by layers or blocks, then the scales of activations.

A fit has 300 steps of a unit, which suits two cores; the papers have 10 000 to 20 000 of larger batches, and
`reconstruct.iterations` sets them. Images do not judge (`held_out` 0): a recipe with a paper's name does what the paper
does, helpful or not. Activations are trained behind the weights, by blocks, where a paper trains both together too.
They get 100 steps: with 8 bits, 300 leave 97 % of a block's error (mnist-onnx, 4-bit weights), for twice the time of
the weights. Islands are the first and the last layer; what a paper leaves in float besides, or quantizes to 8 bits, is
named in `paper`.

With 4-bit weights and eta 1 (mnist-onnx, DDIM, 20 steps, PSNR median of 32 images): w8a8 13.1 dB, with PTQD's
corrections alone 17.0, ptqd without its scales of activations 21.9. passes/reconstruct.py has the figures at eta 0.
"""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..allocate_steps import AllocateSteps
from ..assign_bits import AssignBits
from ..choose_scales import ChooseScales
from ..correct_bias import CorrectBias
from ..equalize_weights import EqualizeWeights
from ..fit_noise import FitNoise
from ..learn_scales import LearnScales
from ..reconstruct import Reconstruct
from ..split_shortcuts import SplitShortcuts
from .parts import EVERY_CALL, EXACT, NOISY, against_w8a8, static

_FISHER = Reconstruct(curvature="fisher", learning_rate=0.03, regularization=10.0, held_out=0)
_WINDOWS = Reconstruct(window=2, low_rank=5, learning_rate=0.03, regularization=1.0, scale_shares=1e-3, held_out=0)
_ACTIVATIONS = LearnScales(zero_points=False, iterations=100, held_out=0)
_Q_DIFFUSION = static(SplitShortcuts(), behind=(Reconstruct(held_out=0), _ACTIVATIONS))

TRAINED = (
    against_w8a8(
        "adaround",
        "w4a8",
        "AdaRound, arXiv 2004.10568 (300 steps of a layer; the loss is relative to the start's; from the rounding to "
        "nearest where that stays better)",
        "w8a8 with weights whose rounding is learned against the outputs of each layer",
        static(behind=(Reconstruct(unit="layer", held_out=0),)),
    ),
    against_w8a8(
        "adaquant",
        "w4a8",
        "AdaQuant and its integer program, arXiv 2006.10518 (300 steps of a layer; layers scored by epsilon's error; "
        "biases by the mean error of their layer in place of its tuning of normalizations)",
        "w8a8 with 2, 4 or 8 bits for each layer, 4 on average, whose weights and scales are trained against the "
        "outputs of each layer, and corrected biases",
        static(
            plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8)),),
            behind=(
                LearnScales(what="both", through="layer", weight_steps=3e-3, held_out=0),
                CorrectBias(steps="mean", held_out=0),
            ),
        ),
    ),
    against_w8a8(
        "white-paper",
        "w4a8",
        "A White Paper on Neural Network Quantization, arXiv 2106.08295 (its pipeline after training: equalization, "
        "ranges by mean square, AdaRound; 300 steps of a layer; no absorption of biases)",
        "w8a8 with equal ranges of the channels between two layers, ranges by mean square, and weights whose rounding "
        "is learned against the outputs of each layer",
        static(
            EqualizeWeights(),
            scales=ChooseScales(activations="mse"),
            behind=(Reconstruct(unit="layer", held_out=0),),
        ),
    ),
    against_w8a8(
        "brecq",
        "w4a8",
        "BRECQ, arXiv 2102.05426 (300 steps of a block; mean squares in place of the Fisher diagonal)",
        "w8a8 with weights whose rounding is learned against the outputs of each block, then scales of activations",
        static(behind=(Reconstruct(held_out=0), _ACTIVATIONS)),
    ),
    Recipe(
        "mrecg",
        "brecq with the three pairs of neighbouring blocks trained as one whose weights differ most in bits",
        static(behind=(Reconstruct(joined=3, held_out=0), _ACTIVATIONS)),
        paper="MRECG, arXiv 2303.11906 (blocks by their capacities, without the factor of strides; three pairs; "
        "reconstruction as in BRECQ)",
        baseline="brecq",
        claim="w4a8",
    ),
    Recipe(
        "q-vlm",
        "brecq with the blocks that read the activations of highest entropy trained together with the next, at most "
        "three at once",
        static(behind=(Reconstruct(joined=3, joined_by="entropy", joined_most=3, held_out=0), _ACTIVATIONS)),
        paper="Q-VLM, arXiv 2410.08119 (its partition into blocks: the three pairs of highest entropy in place of a "
        "threshold, entropies of all values of an activation; reconstruction as in BRECQ, not its search of ranges; "
        "nothing of a vision encoder)",
        baseline="brecq",
        claim="w4a4",
    ),
    Recipe(
        "cbq",
        "brecq in windows of two blocks, each from the rounding that the window before left, with roundings that move "
        "by a product of rank 5 and scales of activations trained with them",
        static(behind=(_WINDOWS,)),
        paper="CBQ, arXiv 2312.07950 (its windows, of two blocks that overlap by one, and LoRA-Rounding of rank 5 from "
        "the fractions of the weights, with a hundredth of brecq's regularization and a fifth of its learning rate, "
        "since a product moves weights together; 300 steps of a window; mean squares without its KL divergence; scales "
        "of weights stay, those of activations move in the last window that has them; outliers are not preprocessed)",
        baseline="brecq",
        claim="w4a8",
    ),
    Recipe(
        "fima-q",
        "brecq with errors of blocks weighted by the Fisher matrix of their outputs, a diagonal and a part of low rank",
        static(behind=(_FISHER, _ACTIVATIONS)),
        paper="FIMA-Q, arXiv 2506.11543 (the Fisher matrix of epsilon from its gradients, in place of KL divergences "
        "at perturbed outputs; a part of rank 4; a tenth of brecq's regularization and a fifth of its learning rate, "
        "with which more units get better; 300 steps of a block; scales of activations are trained behind the weights, "
        "by mean squares)",
        baseline="brecq",
        claim="w4a8",
    ),
    against_w8a8(
        "qdrop",
        "w4a8",
        "QDrop, arXiv 2203.05740 (half of the elements of activations unquantized in each step; 300 steps of a block; "
        "scales of activations are trained behind the weights, not with them)",
        "brecq with activations that are quantized at random while weights are trained",
        static(behind=(Reconstruct(drop=0.5, held_out=0), _ACTIVATIONS)),
    ),
    against_w8a8(
        "q-diffusion",
        "w4a8",
        "Q-Diffusion, arXiv 2302.04304 (300 steps of a block; the first and the last layer stay in float, where the "
        "paper quantizes all; all shortcuts are split, not those of 1x1 kernels alone)",
        "brecq, calibrated along the trajectory, with separate quantizers for the parts of a shortcut's concatenation",
        _Q_DIFFUSION,
    ),
    against_w8a8(
        "ptqd",
        "w4a8",
        "PTQD, arXiv 2305.10657 (its three corrections at every call, in the closed forms of the paper, on the "
        "quantizer of Q-Diffusion; shortcuts and changes of size are quantized, which it leaves in float; its widths "
        "by step are `mezzotint mix`)",
        "q-diffusion with a sampling loop that corrects the quantization noise as the paper writes it, helpful or not",
        (*_Q_DIFFUSION, FitNoise(form="ptqd", gate=False)),
        claim_eta=NOISY,
    ),
    against_w8a8(
        "eda-dm",
        "w4a8",
        "EDA-DM, arXiv 2401.04585 (300 steps of a block; with the regularizer that its code leaves out, because soft "
        "weights are rounded in the end; the first and the last layer in float, not in 8 bits; scales of activations "
        "are trained behind the weights, not with them)",
        "qdrop with the errors of the layers inside each block, calibrated and trained on half of the samples, with "
        "more of them at calls that resemble many others or differ from all",
        (
            *(*EXACT, AllocateSteps(method="density"), *static()[len(EXACT) :]),
            *(Reconstruct(drop=0.5, inner=1.0, held_out=0), _ACTIVATIONS),
        ),
    ),
    Recipe(
        "tfmq",
        "time features stored as tables, finite set calibration (a row of scales for each activation and call), and "
        "weights whose rounding is learned against the outputs of each block",
        (*EVERY_CALL, Reconstruct(held_out=0)),
        paper="TFMQ-DM, arXiv 2311.16503 (time features cached in float, as in its journal version, so its temporal "
        "block has nothing to train: reconstruct trains it where it is quantized; 300 steps of a block; the second "
        "layer, shortcuts and changes of size are quantized, which it leaves in float)",
        baseline="w8a8-time",
        claim="w4a8",
    ),
)
