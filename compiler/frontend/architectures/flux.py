"""Transformers over packed tokens `[B, N, C]` with ids of positions: Flux, Flux 2 and Chroma.

A size is that of the latents in front of the packing, which makes one token of 2x2 latents. The ids have no batch axis,
and depend on the size alone: they are constants of the export, like those that the pipelines of diffusers compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mezzotint.runtime.sampling.flow_sigmas import BY_LENGTH_AND_STEPS

from .positions import packed_ids
from .row import (
    PROMPT,
    PROMPT_LENGTH,
    Architecture,
    Asked,
    Input,
    NetworkCall,
    NetworkInputs,
    TokenRows,
    tokens_of_grid,
)

_MASK, _GUIDANCE = "attention_mask", "guidance"
MOST_TOKENS = 4096  # of a prompt whose positions count its tokens
USUAL_SIDE = 128  # latents of an image of 1024 pixels
PACKED = 2


def packed_grid(asked: Asked) -> tuple[int, int]:
    """Return the rows and columns of tokens. Raises ModelError for a size that cannot be packed."""
    height, width = asked.side(USUAL_SIDE)
    if height % PACKED or width % PACKED:
        raise asked.error(f"latents of {height}x{width} cannot be packed by {PACKED}x{PACKED}", "give another --size")
    return height // PACKED, width // PACKED


def _packed(asked: Asked, tokens: int, conditions: dict[str, Input]) -> NetworkInputs:
    """Return the inputs of a network whose prompt has so many tokens."""
    channels, grid = asked.number("in_channels"), packed_grid(asked)
    prompt = {PROMPT: Input((tokens, asked.number("joint_attention_dim")), length=PROMPT_LENGTH)}
    shape = (grid[0] * grid[1], channels)
    return NetworkInputs("hidden_states", shape, prompt | conditions, None, asked.predicted, grid=grid, channel_axis=2)


def _flux(asked: Asked) -> NetworkInputs:
    conditions = {"pooled_projections": Input((asked.number("pooled_projection_dim"),)), **_guidance(asked)}
    return _packed(asked, asked.tokens(PROMPT, 512), conditions)


def _flux2(asked: Asked) -> NetworkInputs:
    return _packed(asked, asked.tokens(PROMPT, 512), _guidance(asked))


def _chroma(asked: Asked) -> NetworkInputs:
    """The pipeline of Chroma gives the mask as float32 ones and zeros, which attention adds to its scores."""
    tokens = asked.tokens(PROMPT, 512)
    known = _packed(asked, tokens, {})
    mask = Input((tokens + known.shape[0],), kind="soft_mask", hidden=tokens - 1, length=PROMPT_LENGTH)
    return _packed(asked, tokens, {_MASK: mask})


def _guidance(asked: Asked) -> dict[str, Input]:
    return {_GUIDANCE: Input(())} if asked.config.get("guidance_embeds") else {}


def _ids(module: Any, known: NetworkInputs) -> dict[str, Any]:
    """Return the ids of Flux: zeros for a prompt, (0, row, column) for an image."""
    import torch

    return {"txt_ids": TokenRows((0.0,) * 3, (0.0,) * 3), "img_ids": torch.tensor(packed_ids(known.grid))}


def _ids_of_four(module: Any, known: NetworkInputs) -> dict[str, Any]:
    """Return the ids of Flux 2: (0, 0, 0, token) for a prompt, (0, row, column, 0) for an image."""
    import torch

    text = TokenRows((0.0,) * 4, (0.0, 0.0, 0.0, 1.0))
    return {"txt_ids": text, "img_ids": torch.tensor(packed_ids(known.grid, axes=4))}


def _traced(module: Any, known: NetworkInputs) -> NetworkCall:
    """Return a call whose positions are constants: those of an image, and one row for all tokens of its prompt.

    The positions of ids that follow an open length are computed in every call else, in float64.
    """
    import torch

    ids = _ids(module, known)
    image, text = module.pos_embed(ids["img_ids"]), module.pos_embed(ids["txt_ids"].of(1))

    def call(network: Any, arguments: dict[str, Any]) -> Any:
        tokens = arguments[PROMPT].shape[1]
        joined = tuple(torch.cat([t.expand(tokens, -1), i]) for t, i in zip(text, image, strict=True))
        with _answering(network.pos_embed, joined):
            return network(**arguments, return_dict=False)[0]

    return call


def _traced_of_four(module: Any, known: NetworkInputs) -> NetworkCall:
    """Return a call whose positions are constants: those of an image, and a table of which the prompt has some rows."""
    import torch

    ids = _ids_of_four(module, known)
    image, text = module.pos_embed(ids["img_ids"]), module.pos_embed(ids["txt_ids"].of(MOST_TOKENS))

    def call(network: Any, arguments: dict[str, Any]) -> Any:
        tokens = arguments[PROMPT].shape[1]
        with _answering(network.pos_embed, image, tuple(part[torch.arange(tokens)] for part in text)):
            return network(**arguments, return_dict=False)[0]

    return call


@contextmanager
def _answering(module: Any, *answers: Any) -> Iterator[None]:
    """Let a module return these answers, in turn."""
    left = iter(answers)
    module.forward = lambda *arguments, **options: next(left)
    try:
        yield
    finally:
        del module.forward


@contextmanager
def open_batch(module: Any) -> Iterator[None]:
    """Let Chroma's time embedding keep its batch open.

    It makes zeros by `[0] * batch_size`, a list with a length that torch.export fixes: "You marked batch as dynamic but
    your code specialized it to be a constant". The embedding of zero is one row, which is repeated here.
    """
    import torch

    embedding = module.time_text_embed
    zero = embedding.guidance_proj(torch.zeros(1))
    places = embedding.mod_proj

    def forward(timestep: Any) -> Any:
        batch, count = timestep.shape[0], places.shape[0]
        both = torch.cat([embedding.time_proj(timestep), zero.expand(batch, -1)], dim=1)
        return torch.cat([both[:, None].expand(-1, count, -1), places[None].expand(batch, -1, -1)], dim=-1)

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


FLUX = Architecture(
    "FluxTransformer2DModel",
    _flux,
    {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": False},
    unit="fraction",
    sigmas="even, but own with use_flow_sigmas",
    tokens=tokens_of_grid,
    constants=_ids,
    traced=_traced,
)
FLUX2 = Architecture(
    "Flux2Transformer2DModel",
    _flux2,
    {"in_channels": 128, "joint_attention_dim": 15360, "guidance_embeds": True},
    unit="fraction",
    sigmas="even, but own with use_flow_sigmas",
    tokens=tokens_of_grid,
    shift_by=BY_LENGTH_AND_STEPS,
    constants=_ids_of_four,
    traced=_traced_of_four,
)
CHROMA = Architecture(
    "ChromaTransformer2DModel",
    _chroma,
    {"in_channels": 64, "joint_attention_dim": 4096},
    unit="fraction",
    sigmas="even",
    tokens=tokens_of_grid,
    constants=_ids,
    traced=_traced,
    patches=(open_batch,),
)
