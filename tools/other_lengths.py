"""Other lengths of prompts than that of the calibration: torch beside the exported graph, W8A8 beside float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint import Bundle
from mezzotint.compiler.core.verify import relative_difference
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import EXTRA_CHANNELS, Signature
from tools.tiny_network import TinyModel

STEP = 499  # the timestep of the parity
MORE = (-2, 9)  # tokens of a prompt than in the calibration
ROWS = 4  # of the comparison with the float graph


def example_and_prediction(module: Any, tiny: TinyModel, signature: Signature) -> tuple[Any, Any]:
    """Return the example of a network, and torch's prediction for it at the timestep of the parity."""
    import torch

    from mezzotint.compiler.frontend.torch_example import example_of

    example = example_of(module, tiny.size, torch.float32, tiny.asked)
    time = torch.full((2,), float(signature.network_time(STEP)))
    with torch.no_grad():
        return example, example.denoiser(module)(*{**example.tensors, example.timestep: time}.values()).numpy()


def graph_parity(want: Any, example: Any, signature: Signature, file: Path, shape: Sequence[int]) -> float:
    """Return the largest difference of the exported graph from torch over the largest output, in the image's
    channels."""
    arrays = {name: tensor.numpy() for name, tensor in example.tensors.items() if name != example.timestep}
    sample, image, axis = arrays.pop(example.sample), signature.channels(shape), signature.channel_axis
    if EXTRA_CHANNELS in signature.conditions:
        sample, arrays[EXTRA_CHANNELS] = np.split(sample, [image], axis)
    got = Denoiser(file, signature, threads=1)(np.ascontiguousarray(sample), STEP, **arrays)
    return relative_difference(np.split(want, [image], axis)[0], got)


def other_lengths(module: Any, tiny: TinyModel, bundle: Bundle, exported: Path) -> dict[str, Any]:
    """Return parities at two other lengths, and the SQNR in dB at the calibrated and at the longer one.

    The SQNR is the worst of the deployed timesteps, on noise: the same for both lengths. {} for a network without an
    open length.
    """
    sizes = bundle.manifest.calibration.sizes
    if not sizes:
        return {}
    signature, shape = bundle.signature, bundle.sample_shape
    parity = []
    for more in MORE:
        other = _longer(tiny, bundle, more)
        example, want = example_and_prediction(module, other, signature)
        parity.append(graph_parity(want, example, signature, exported, shape))
    exact, net = Denoiser(exported, signature, threads=1), bundle.denoiser(1)
    x = np.random.default_rng(5).standard_normal((ROWS, *shape)).astype(np.float32)
    db = []
    for more in (0, MORE[-1]):
        rows = _longer(tiny, bundle, more).conditions(ROWS)
        calls = dict.fromkeys(bundle.deployment.calls)
        db.append(min(float(sqnr_db(exact(x, t, **rows), net(x, t, **rows))) for t in calls))
    lengths = [size + more for size in list(sizes.values())[:1] for more in (0, *MORE)]
    return {"lengths": lengths, "length_parity": max(parity), "length_db": db}


def _longer(tiny: TinyModel, bundle: Bundle, more: int) -> TinyModel:
    """Return a network whose prompts have so many tokens more."""
    inputs = bundle.manifest.require_inputs()
    known = {name: rows.shape[1:] for name, rows in tiny.conditions(1).items()}
    asked = dict(tiny.asked)
    for name, sizes in known.items():
        if sizes and inputs[name].shape[1] in bundle.manifest.calibration.sizes:
            asked[name] = (sizes[0] + more, *sizes[1:])
    return replace(tiny, asked=asked)
