"""Recipes whose whole network is trained: those of papers, and ours for narrow widths.

The papers train for hours on a GPU; a fit of theirs has 1000 steps of 8 samples here (`distill.iterations`,
`distill.batch`). Ours have as many as fit into 25 minutes, at most 2000.
"""

from __future__ import annotations

from dataclasses import replace

from mezzotint.compiler.core.pipeline import Recipe

from ..assign_bits import AssignBits
from ..choose_levels import ChooseLevels
from ..choose_scales import ChooseScales
from ..dilate_weights import DilateWeights
from ..distill import Distill
from ..learn_scales import LearnScales
from ..observe import Observe
from ..reconstruct import Reconstruct
from ..round_weights import RoundWeights
from ..smooth_scales import SmoothScales
from ..store_half import StoreHalf
from .parts import BY_CHANNEL, EVERY_CALL, FAST, against_w8a8, static, stepwise

ALWAYS = -100.0
"""dB: the factors of inputs belong to the method, whatever is expected of them."""
PUBLISHED_FIT = Distill(iterations=1000)
LONG_FIT = Distill(iterations=2000, minutes=25.0)
BLOCK_FIT = LearnScales(what="both", weight_steps=3e-3, mixed=4, iterations=1000, calls=100, held_out=0)
CAREFUL_FIT = replace(LONG_FIT, weight_steps=1e-3)
"""From weights that are good already: larger steps forget what GPTQ compensated (docs/explanation/training.md)."""

DISTILLED = (
    Recipe(
        "efficientdm",
        "a row of scales for each activation and call, and weights that move by low-rank adapters, trained together "
        "against the float network's predictions; the adapters are merged and rounded",
        (*EVERY_CALL, replace(PUBLISHED_FIT, weights="adapters", floats=False, scales="activations")),
        paper="EfficientDM, arXiv 2310.03270 (1000 steps of 8 samples; the loss is relative to each call's error; "
        "scales of weights stay; the first and the last layer stay in float)",
        baseline="w8a8-calls",
        claim="w4a4",
    ),
    Recipe(
        "dilatequant",
        "weight columns enlarged to the range of their rows, a row of scales for each activation and call, and weights "
        "and all scales trained together, one block behind the other, against the outputs of the block",
        (
            *(*FAST, BY_CHANNEL, DilateWeights(run_time=True, run_time_gain=0.1, timed=False)),
            *(*EVERY_CALL[len(FAST) :], BLOCK_FIT),
        ),
        paper="DilateQuant, arXiv 2409.14307 (1000 steps of 8 samples for a block, of 4 calls each; weights move by "
        "steps of their grids; the first and the last layer stay in float)",
        baseline="dilate",
        claim="w4a4",
    ),
    Recipe(
        "quest",
        "weights whose rounding is learned by blocks, then the weights of linear layers, the time features and the "
        "scales of activations trained against the outputs of blocks and the prediction",
        static(
            behind=(
                Reconstruct(held_out=0),
                replace(PUBLISHED_FIT, kinds=("linear",), scales="activations", blocks=0.5),
            )
        ),
        paper="QuEST, arXiv 2402.03666 (linear layers are those of attention and feed-forward; time features are rows "
        "of tables; one phase for both; 1000 steps of 8 samples)",
        baseline="w8a8",
        claim="w4a4",
    ),
    against_w8a8(
        "efqat",
        "w4a8",
        "EfQAT, arXiv 2411.11038 (a quarter of each weight's rows; from weights rounded to nearest; gradients of all "
        "rows are computed, so that no time is saved; 1000 steps of 8 samples)",
        "w8a8 with the loudest quarter of the output channels of each weight trained against the float network's "
        "predictions",
        static(behind=(replace(PUBLISHED_FIT, critical=0.25, floats=False, scales="activations"),)),
    ),
    against_w8a8(
        "pams",
        "w4a4",
        "PAMS, arXiv 2011.04212 (both ends of a range are trained, not its maximum alone; the outputs of all blocks in "
        "place of its structured knowledge transfer; 1000 steps of 8 samples)",
        "w8a8 with weights and the ranges of activations trained against the outputs of blocks and the prediction",
        static(behind=(replace(PUBLISHED_FIT, scales="activations", blocks=1.0),)),
    ),
    Recipe(
        "paretoq",
        "neuqi with weights of 2 bits that are trained against the float network's predictions",
        static(
            observe=Observe(channels="inputs"),
            scales=ChooseScales(weight_bits=2),
            plan=(ChooseLevels(method="affine"),),
            behind=(RoundWeights(), PUBLISHED_FIT),
        ),
        paper="ParetoQ, arXiv 2502.02631 (levels with a zero point of their own in place of its four balanced ones; "
        "levels stay; 1000 steps of 8 samples)",
        baseline="neuqi",
        claim="w2a8",
    ),
    against_w8a8(
        "qvgen",
        "w4a4",
        "QVGen, arXiv 2505.11497 (components of a branch keep the order of the start, where it decomposes the branch "
        "anew in each phase; static scales; 1000 steps of 8 samples)",
        "w8a8 with weights and all scales trained against the float network's predictions, at first with a float "
        "branch of rank 32 added to each weight, which fades",
        static(behind=(replace(PUBLISHED_FIT, scales="both", branch_rank=32),)),
    ),
    Recipe(
        "ofq",
        "w8a8 with weights and the scales of activations trained against the float network's predictions; scales of "
        "weights follow mean magnitudes, and in the last quarter of the fit only weights near a threshold move",
        static(behind=(replace(PUBLISHED_FIT, scales="statistics", boundary=0.005),)),
        paper="OFQ, arXiv 2302.02210 (scales keep the ratio to the mean magnitude that they have at the start, not 2 "
        "on a grid without 0; one scale for each output channel in place of each head; without its "
        "reparameterization of queries and keys; annealing is the last quarter of one fit; 1000 steps of 8 samples)",
        baseline="lsq",
        claim="w4a4",
    ),
    Recipe(
        "gaqat",
        "w8a8 with weights and all scales trained against the float network's predictions; scales whose gradients "
        "changed their sign in less than 30 % of 20 iterations are frozen for the next 20",
        static(behind=(replace(PUBLISHED_FIT, scales="both", freeze_below=0.3),)),
        paper="GAQAT, arXiv 2412.05551 (the freezing of scales alone, without gradients of flatness and its domains; a "
        "frozen scale stays; the window and the share are ours; 1000 steps of 8 samples)",
        baseline="lsq",
        claim="w4a4",
    ),
    Recipe(
        "matryoshka",
        "w8a8 with 4-bit weights, trained so that the integers of 8 bits, rounded to 4 and 2, are good at each of the "
        "three widths; the error with 2 bits counts ten times as much as the others",
        static(
            scales=ChooseScales(weight_bits=4),
            behind=(replace(PUBLISHED_FIT, scales="activations", nested="rounded", nested_shares=(0.1, 0.1, 1.0)),),
        ),
        paper="Matryoshka quantization, arXiv 2502.06786 (symmetric grids; scales of weights are those of the largest "
        "magnitudes at the start; the loss is a logarithm; a file has one width; 1000 steps of 8 samples)",
        baseline="lsq",
        claim="w2a8",
    ),
    Recipe(
        "double-rounding",
        "w8a8 with 4-bit weights, trained with all scales so that the integers of 8 bits, rounded a second time to 4 "
        "and 2 bits, are good at each of the three widths",
        static(scales=ChooseScales(weight_bits=4), behind=(replace(PUBLISHED_FIT, scales="both", nested="rounded"),)),
        paper="Double Rounding, arXiv 2502.01199 (symmetric grids without a zero point of weights; all widths have one "
        "learning rate of scales; without mixed widths; a file has one width; 1000 steps of 8 samples)",
        baseline="lsq",
        claim="w4a8",
    ),
    Recipe(
        "pv-tuning",
        "ganq with weights of 2 bits, whose codes and levels are trained together against the float network's "
        "predictions",
        static(
            observe=Observe(channels="inputs"),
            scales=ChooseScales(weight_bits=2),
            plan=(ChooseLevels(),),
            behind=(RoundWeights(refits=4), replace(PUBLISHED_FIT, level_steps=1e-3)),
        ),
        paper="PV-Tuning, arXiv 2405.14852 (a table of levels for each output channel in place of additive vectors; "
        "codes by straight-through gradients in each step, not in a subspace in turns; 1000 steps of 8 samples)",
        baseline="ganq",
        claim="w2a8",
    ),
    Recipe(
        "bitsfusion",
        "pv-tuning with 1 to 3 bits for each layer, 1.99 on average, by the error that its levels make in epsilon",
        static(
            observe=Observe(channels="inputs"),
            scales=ChooseScales(weight_bits=2),
            plan=(AssignBits(mean_bits=1.99, widths=(1, 2, 3), levels="kmeans"),),
            behind=(RoundWeights(refits=4), replace(PUBLISHED_FIT, level_steps=1e-3)),
        ),
        paper="BitsFusion, arXiv 2406.04333 (levels by k-means for each row in place of its balanced integers, whose "
        "additional level would cost a bit of each code here; widths by an integer program over errors of epsilon; "
        "codes by GPTQ; one phase of training, at equally likely calls; 1000 steps of 8 samples)",
        baseline="pv-tuning",
        claim="w2a8",
    ),
    Recipe(
        "onebit",
        "weights of 1 bit, their signs, with a number for each output channel and one for each input channel, trained "
        "together against the float network's predictions",
        static(
            BY_CHANNEL,
            SmoothScales(form="signs", weight_bits=1, gain=ALWAYS, run_time=True, run_time_gain=ALWAYS, timed=False),
            observe=Observe(channels="inputs"),
            scales=ChooseScales(weight_bits=1),
            plan=(ChooseLevels(method="normal"),),
            behind=(replace(PUBLISHED_FIT, scales="both"),),
        ),
        paper="OneBit, arXiv 2402.11295 (numbers of inputs in the norm or layer in front where they have a place, "
        "else as a product at run time, for convolutions by channel; those of outputs by least error at the layer's "
        "inputs; the loss is that of the prediction alone; activations of 8 bits; 1000 steps of 8 samples)",
        baseline="ganq",
        claim="w1a8",
    ),
    Recipe(
        "dgms",
        "w8a8 with weights of 3 bits on levels by k-means for each layer, which are trained with the weights against "
        "the float network's predictions",
        static(
            observe=Observe(channels="inputs"),
            scales=ChooseScales(weight_bits=3),
            plan=(ChooseLevels(tables="tensor"),),
            behind=(replace(PUBLISHED_FIT, level_steps=3e-3),),
        ),
        paper="DGMS, arXiv 2112.15131 (nearest levels with straight-through gradients in place of a mixture of normal "
        "distributions that hardens; int8 levels; 1000 steps of 8 samples)",
        baseline="w8a8",
        claim="w3a8",
    ),
    against_w8a8(
        "mpq-dm",
        "w4a8",
        "MPQ-DM, arXiv 2412.11549 (channels by kurtosis; widths by an integer program, not one bit more or less; "
        "relations of the last block with gradients, which its code detaches; without its smoothing at run time)",
        "2, 4 or 8 bits for each tenth of a layer's output channels, 4 on average, and weights that move by low-rank "
        "adapters, trained against predictions and relations between positions",
        static(
            plan=(AssignBits(mean_bits=4.0, widths=(2, 4, 8), parts=10, order="kurtosis"),),
            behind=(replace(PUBLISHED_FIT, weights="adapters", scales="activations", relations=1.0),),
        ),
    ),
)

NARROW_WIDTHS = (
    Recipe(
        "w4a8-best",
        "w8a8-steps with 4-bit weights, stored in half a byte each, rounded against their inputs (GPTQ) and then "
        "trained along the trajectory; images of held-out noise decide what is kept",
        stepwise(weight_bits=4, behind=(RoundWeights(), CAREFUL_FIT, StoreHalf(scales=True))),
        paper="GPTQ, arXiv 2210.17323; EfficientDM, arXiv 2310.03270 (training along the trajectory); TDQ, arXiv "
        "2306.02316",
        baseline="w8a8-steps",
        claim="w4a8",
    ),
    Recipe(
        "w6a6-best",
        "w8a8-best with 6-bit weights and activations on 8-bit kernels, trained along the trajectory with the scales",
        stepwise(
            weight_bits=6,
            scales=ChooseScales(activations="mse", weight_bits=6, activation_bits=6),
            behind=(RoundWeights(), replace(CAREFUL_FIT, scales="activations")),
        ),
        paper="GPTQ, arXiv 2210.17323; EfficientDM, arXiv 2310.03270; TDQ, arXiv 2306.02316",
        baseline="w8a8-steps",
        claim="w6a6",
    ),
    Recipe(
        "w4a4",
        "w8a8-best with 4-bit weights and activations on 8-bit kernels, trained along the trajectory with all scales",
        stepwise(
            weight_bits=4,
            scales=ChooseScales(weight_bits=4, activation_bits=4),
            behind=(RoundWeights(), replace(LONG_FIT, scales="both"), StoreHalf(scales=True)),
        ),
        paper="GPTQ, arXiv 2210.17323; EfficientDM, arXiv 2310.03270; TDQ, arXiv 2306.02316",
        baseline="w8a8-steps",
        claim="w4a4",
    ),
)
"""Ours. Inputs of 4 and 6 bits run on 8-bit kernels: images count, and no speed is claimed.

With 6 bits ranges are those of least error (mnist-onnx, 300 iterations, epsilon and PSNR median / 10th percentile:
30.7, 38.7 / 33.6 dB, and 29.1, 37.9 / 30.8 with percentiles). With 4 bits such ranges cut off more, and what is cut off
adds up: the digits have 29.5 / 20.4 dB by them and 30.8 / 20.5 by percentiles, mnist-onnx 26.4 / 20.7 and 26.3 / 20.4.
"""
