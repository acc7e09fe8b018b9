"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): one call of twice the batch, then one prediction of both.

    out = out_u + scale * (out_c - out_u)

The unconditional half comes first, as in diffusers' pipelines. Independent errors of the two halves add up to scale^2 +
(1 - scale)^2 times the variance (98 times at 7.5). So statistics of the noise are measured on the combined output, at
the deployed scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..signature import ClassLabels, Images, Predict, Signature
from .condition_network import ConditionNetwork, Conditions, Network
from .deployment import Deployment

__all__ = [
    "Conditions",
    "Network",
    "checked_rows",
    "combine",
    "doubled",
    "doubled_conditions",
    "guided",
    "label_rows",
    "not_finite",
    "null_rows",
    "predictor",
    "predictors",
    "rows_in_turn",
    "with_labels",
]


def doubled_conditions(conditions: Conditions, unconditional: Conditions) -> dict[str, npt.NDArray[Any]]:
    """Return `[2 B, ...]`, unconditional rows first. A condition without unconditional rows is the same in both halves.

    Arrays of `unconditional` have one row or as many as those of `conditions`. Raises InputError for others.
    """
    if extra := sorted(set(unconditional) - set(conditions)):
        raise InputError(f"unconditional rows for {extra[0]!r}, which is no condition here")
    if not unconditional:
        raise InputError(
            "guidance needs unconditional rows (those of the empty prompt, or of the null class)",
            hint="give them: unconditional={name: array of one row}, or --unconditional FILE.npz",
        )
    both = {}
    for name, rows in conditions.items():
        other = np.asarray(unconditional.get(name, rows))
        if other.ndim != rows.ndim or other.shape[1:] != rows.shape[1:] or len(other) not in (1, len(rows)):
            raise InputError(f"unconditional {name!r} has shape {list(other.shape)}, the condition {list(rows.shape)}")
        if other.dtype != rows.dtype:
            raise InputError(f"unconditional {name!r} is {other.dtype}, the condition {rows.dtype}")
        if len(other) != len(rows):
            other = np.repeat(other, len(rows), axis=0)
        both[name] = np.concatenate([other, rows])
    return both


def not_finite(rows: npt.NDArray[Any]) -> int | None:
    """Return the first row with NaN or infinite values, or None."""
    if rows.dtype.kind not in "fc" or bool(np.isfinite(rows).all()):
        return None
    return int(np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))[0])


def checked_rows(conditions: Conditions, role: str = "condition") -> dict[str, npt.NDArray[Any]]:
    """Return the conditions as arrays. Raises InputError for arrays without rows and values that are no numbers."""
    arrays = {name: np.atleast_1d(np.asarray(a)) for name, a in conditions.items()}  # a number is one row
    for name, array in arrays.items():
        if not array.size or array.dtype.hasobject:
            raise InputError(
                f"{role} {name!r} has shape {list(array.shape)} of {array.dtype}",
                hint="give numbers [rows, ...]: image i takes row i, and the rows start over after the last one",
            )
        if (row := not_finite(array)) is not None:
            raise InputError(
                f"{role} {name!r} has NaN or infinite values in row {row}", hint="look at the program that wrote it"
            )
    return arrays


def rows_in_turn(conditions: Conditions, first: int, n: int) -> dict[str, npt.NDArray[Any]]:
    """Return the rows of images first .. first + n - 1: image i takes row i, starting over after the last one."""
    return {name: np.take(a, np.arange(first, first + n) % len(a), axis=0) for name, a in conditions.items()}


def label_rows(labels: ClassLabels, first: int = 0) -> npt.NDArray[np.int64]:
    """Return all classes in turn, `[classes]` from that of image `first`: image i has the class i, starting over."""
    return (np.arange(labels.classes) + first) % labels.classes


def null_rows(signature: Signature) -> dict[str, npt.NDArray[Any]]:
    """Return the row of no class of each condition of class labels."""
    return {label.name: np.array([label.null]) for label in signature.labels}


def with_labels(
    signature: Signature,
    plan: Deployment,
    conditions: Conditions | None,
    unconditional: Conditions | None,
    first: int = 0,
    computing: ConditionNetwork | None = None,
) -> tuple[Conditions, Conditions]:
    """Return conditions and unconditional rows, with all classes in turn for class labels that were left out.

    For guidance without any unconditional rows these are the null class. Row 0 is that of image `first`. Rows of the
    network that computes conditions are among them. Raises InputError where it lacks some.
    """
    classes = {label.name: label_rows(label, first) for label in signature.labels}
    rows = {**classes, **(conditions or {})}
    without = unconditional or (null_rows(signature) if plan.guided else {})
    return rows if computing is None else computing.all_rows(rows), without


def doubled(x: Images) -> Images:
    """Return x for both halves, `[2 B, ...]`."""
    return np.concatenate([x, x])


def combine(output: Images, scale: float) -> Images:
    """Return the guided prediction `[B, ...]` of both halves `[2 B, ...]`, a new array."""
    without, conditional = np.split(output, 2)
    guided: Images = (conditional - without) * np.float32(scale)
    guided += without
    return guided


def guided(network: Network, conditions: Conditions, scale: float) -> Predict:
    """Return a denoiser for the sampling loop, from a network and conditions of `doubled_conditions`."""
    return lambda x, t: combine(network(doubled(x), t, **conditions), scale)


def predictor(
    network: Network,
    plan: Deployment,
    conditions: Conditions,
    unconditional: Conditions,
    computing: ConditionNetwork | None = None,
) -> Predict:
    """Return a denoiser for the sampling loop: the network with these conditions, guided if the deployment is.

    `computing` gives the conditions that change from call to call.
    """
    fed = network if computing is None else computing.feeding(network)
    if plan.guided:
        return guided(fed, doubled_conditions(conditions, unconditional), plan.guidance)
    return lambda x, t: fed(x, t, **conditions)


def predictors(
    networks: Sequence[Network],
    plan: Deployment,
    conditions: Conditions,
    unconditional: Conditions,
    computing: ConditionNetwork | None = None,
) -> list[Predict]:
    """Return `predictor` of each call's network; calls of one network share one."""
    rows = conditions, unconditional, computing
    by_network = {network: predictor(network, plan, *rows) for network in dict.fromkeys(networks)}
    return [by_network[network] for network in networks]
