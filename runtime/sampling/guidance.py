"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): one call of twice the batch, then one prediction of both.

    out = out_u + scale * (out_c - out_u)

The unconditional half comes first, as diffusers' pipelines have it. Errors of the two halves add up to scale^2 +
(1 - scale)^2 times the variance where they are independent (98 times at 7.5): statistics of the noise are those of the
combined output, at the deployed scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..signature import Images, Predict
from .deployment import Deployment

Conditions = Mapping[str, npt.NDArray[Any]]
Network = Callable[..., Images]
"""`network(x, timestep, **conditions) -> output`."""


def doubled_conditions(conditions: Conditions, unconditional: Conditions) -> dict[str, npt.NDArray[Any]]:
    """`[2 B, ...]`, unconditional rows first; a condition without unconditional rows is the same in both halves.

    Arrays of `unconditional` have one row or as many as those of `conditions`. Raises InputError for others.
    """
    if extra := sorted(set(unconditional) - set(conditions)):
        raise InputError(f"unconditional rows for {extra[0]!r}, which is no condition here")
    if not unconditional:
        raise InputError(
            "guidance needs unconditional rows (those of the empty prompt, or of the null class)",
            hint="give them: unconditional={name: array of one row}, or --unconditional FILE.npz",
        )
    found = {}
    for name, rows in conditions.items():
        other = np.asarray(unconditional.get(name, rows))
        if other.ndim != rows.ndim or other.shape[1:] != rows.shape[1:] or len(other) not in (1, len(rows)):
            raise InputError(f"unconditional {name!r} has shape {list(other.shape)}, the condition {list(rows.shape)}")
        if other.dtype != rows.dtype:
            raise InputError(f"unconditional {name!r} is {other.dtype}, the condition {rows.dtype}")
        if len(other) != len(rows):
            other = np.repeat(other, len(rows), axis=0)
        found[name] = np.concatenate([other, rows])
    return found


def doubled(x: Images) -> Images:
    """x for both halves, `[2 B, C, H, W]`."""
    return np.concatenate([x, x])


def combine(output: Images, scale: float) -> Images:
    """The guided prediction `[B, C, H, W]` from both halves `[2 B, C, H, W]`; a new array."""
    without, given = np.split(output, 2)
    guided: Images = (given - without) * np.float32(scale)
    guided += without
    return guided


def guided(network: Network, conditions: Conditions, scale: float) -> Predict:
    """A denoiser for the sampling loop from a network and conditions of `doubled_conditions`."""
    return lambda x, t: combine(network(doubled(x), t, **conditions), scale)


def predictor(network: Network, plan: Deployment, conditions: Conditions, unconditional: Conditions) -> Predict:
    """What the sampling loop calls: the network with these conditions, guided where the deployment is."""
    if plan.guided:
        return guided(network, doubled_conditions(conditions, unconditional), plan.guidance)
    return lambda x, t: network(x, t, **conditions)


def predictors(
    networks: Sequence[Network], plan: Deployment, conditions: Conditions, unconditional: Conditions
) -> list[Predict]:
    """`predictor` for each call's network; networks that are the same share one."""
    made = {network: predictor(network, plan, conditions, unconditional) for network in dict.fromkeys(networks)}
    return [made[network] for network in networks]
