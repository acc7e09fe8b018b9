"""The sampler as JSON: the scalars of each network call, which the page's loop (assets/web/sampler.js) applies.

Nothing of a sampler is written twice: runtime/sampling/steps.py makes the sums of a call, a `Stepper` adds what a
correction changes, and here both become lists of [name, weight]. So every sampler of the runtime runs in the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.samplers import Stepper
from mezzotint.runtime.sampling.steps import Step, Weights
from mezzotint.runtime.signature import Signature


def solver_json(stepper: Stepper, networks: Sequence[str], signature: Signature) -> dict[str, Any]:
    """Return `{"start": factor of the first noise, "calls": [...]}`; `networks` has the name of each call's network.

    A call has `network`, `time` (in the unit of the network's input), `rows` `[[array, [[name, weight], ...]], ...]`,
    and `noise`, its standard deviation; `image` and `clip` only where the image is clipped, `correction` only with one.
    """
    calls = [
        {
            "network": network,
            "time": signature.network_time(step.timestep),
            **_image(step),
            "rows": [[name, _terms(row)] for name, row in step.rows.items()],
            "noise": noise,
            **_correction(stepper.correction, index),
        }
        for index, (step, network, noise) in enumerate(zip(stepper.solver.steps, networks, stepper.noise, strict=True))
    ]
    return {"start": stepper.solver.start, "calls": calls}


def _image(step: Step) -> dict[str, Any]:
    if step.clip is None or not any("image" in row for row in step.rows.values()):
        return {}
    return {"image": _terms(step.image_row), "clip": step.clip}


def _correction(correction: Correction | None, call: int) -> dict[str, Any]:
    if correction is None:
        return {}
    return {"correction": {"scale": float(correction.scale[call]), "shift": correction.shift[call].tolist()}}


def _terms(row: Weights) -> list[list[str | float]]:
    """Return the terms in the order in which the runtime adds them; those of weight 0 are left out there too."""
    return [[name, float(weight)] for name, weight in row.items() if weight]
