"""Recipes about the products of attention: queries with keys, and weights with values."""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Recipe

from ..balance_heads import BalanceHeads
from ..center_attention import CenterAttention
from ..correct_softmax import CorrectSoftmax
from ..delay_softmax import DelaySoftmax
from ..learn_scales import LearnScales
from ..log_attention import LogAttention
from ..observe import Observe
from ..reconstruct import Reconstruct
from ..reparameterize_norms import ReparameterizeNorms
from .parts import UNFUSED, against_w8a8, static

ATTENTION = (
    against_w8a8(
        "softmax-bias",
        "w8a8",
        "Softmax Bias Correction for Quantized Generative Models, arXiv 2309.01729 (added behind the value matmul)",
        "w8a8 with the attention probability that rounding removes from each row added back",
        static(behind=(CorrectSoftmax(),)),
    ),
    against_w8a8(
        "sageattention",
        "w8a8",
        "SageAttention, arXiv 2410.02367 (all layers in 8 bits, not the attention alone; heads balanced by factors in "
        "weights in place of scales for their blocks of tokens; onnxruntime's integer products, not one kernel)",
        "w8a8 with keys without their mean token, balanced heads, and the largest attention weight of each query at 1",
        static(BalanceHeads(center=True), CenterAttention(), DelaySoftmax(), exact=UNFUSED),
    ),
    Recipe(
        "sageattention2",
        "sageattention with queries and values without their mean token, too",
        static(
            BalanceHeads(center=True),
            CenterAttention(queries=True, values=True),
            DelaySoftmax(),
            exact=UNFUSED,
        ),
        paper="SageAttention2, arXiv 2411.10958 (means over all tokens, not over blocks of 128; all layers in few "
        "bits, and weights and values with them, not in FP8; factors in place of scales for threads)",
        baseline="sageattention",
        claim="w4a4",
    ),
    Recipe(
        "repq-vit",
        "repq with attention weights on powers of the square root of 2",
        static(Observe(channels="inputs"), ReparameterizeNorms(), behind=(LogAttention(),)),
        paper="RepQ-ViT, arXiv 2212.08254 (powers as integers of 8 bits)",
        baseline="repq",
        claim="w4a4",
    ),
    Recipe(
        "repquant",
        "repq-vit with both ends of the grids of activations learned, then weights whose rounding is learned, against "
        "the outputs of each block",
        static(
            Observe(channels="inputs"),
            ReparameterizeNorms(),
            behind=(LearnScales(iterations=100, held_out=0), LogAttention(), Reconstruct(held_out=0)),
        ),
        paper="RepQuant, arXiv 2402.05628 (channels behind norms share the two learned ends, which the paper clips one "
        "by one before it merges them, and all other activations learn theirs too; weights are reconstructed as in "
        "BRECQ, by blocks; 100 and 300 steps of a block; powers as integers of 8 bits)",
        baseline="repq-vit",
        claim="w4a4",
    ),
    against_w8a8(
        "dgq-attention",
        "w4a8",
        "DGQ, arXiv 2501.04304 (its attention alone: largest weights by query, powers as integers of 8 bits; no path "
        "of the first token)",
        "w8a8 with attention weights on powers of 2, the largest of each query at 1",
        static(DelaySoftmax(), behind=(LogAttention(base="2"),), exact=UNFUSED),
    ),
)
