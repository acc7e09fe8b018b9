"""The passes of the networks around a denoiser: text encoders and the halves of a VAE."""

from __future__ import annotations

from mezzotint.compiler.core.pipeline import Pass

from ..choose_scales import ChooseScales
from ..clean_qdq import CleanQdq
from ..fold_scales import FoldScales
from ..fuse_attention import FuseAttention
from ..insert_qdq import InsertQdq
from ..lower_norms import LowerNorms
from ..normalize import Normalize
from ..split_layers import SplitLayers

EXACT_TEXT: tuple[Pass, ...] = (Normalize(), SplitLayers(), FoldScales())
EXACT_PICTURE: tuple[Pass, ...] = (Normalize(), FuseAttention(), FoldScales(), LowerNorms())
"""The attention of a VAE is over all places of the latents: thousands of tokens."""


def static_passes(islands: tuple[str, ...]) -> tuple[Pass, ...]:
    """Return the passes behind the statistics of an int8 component, in which `islands` stay in float."""
    return (ChooseScales(), InsertQdq(islands=islands), CleanQdq())
