"""The rows of conditions that a compilation is given, against the inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.open_sizes import open_size
from mezzotint.runtime.sampling.condition_network import ConditionNetwork
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import Conditions, not_finite
from mezzotint.runtime.signature import EXTRA_CHANNELS, Signature

from ..errors import ConditionError

ConditionInputs = Mapping[str, ir.Value]
"""The model's conditions by name, with types and shapes."""
OPEN_TOKENS = 77  # tokens of a prompt of CLIP, for random conditions of an open length
MOST_RANDOM = 1 << 28  # values of one random condition: 1 GB


def check_rows(
    inputs: ConditionInputs,
    deployment: Deployment,
    rows: Conditions,
    unconditional: Conditions,
    computing: ConditionNetwork | None = None,
) -> None:
    """Raise ConditionError when conditions or unconditional rows are missing, or do not fit the model's inputs.

    Conditions that a network computes have no rows; of the rows that it reads alone, the values are checked.
    """
    needed = deployment.guided and not unconditional
    if computing is not None:
        inputs = _without_computed(inputs, computing, rows)
        own = {name: array for name, array in rows.items() if name in computing.own}
        rows = {name: array for name, array in rows.items() if name not in computing.own}
        unconditional = {name: array for name, array in unconditional.items() if name not in computing.own}
        for name, array in own.items():
            _check_finite(name, array, "")
    for name, value in inputs.items():
        if name not in rows:
            raise ConditionError(
                f"the model has a condition {name!r} ({value.dtype}{value.shape}), and no data to calibrate it on",
                where=f"input {name}",
                hint="give --conditions FILE.npz with an array of that name, [rows, ...]; or --conditions random",
            )
        _check_array(name, value, rows[name], "")
    if deployment.guided and not inputs and computing is None:
        raise ConditionError("guidance is for models with a condition", hint="leave out --guidance")
    if needed:
        raise ConditionError(
            f"guidance {deployment.guidance:g} needs unconditional rows (the empty prompt, the null class)",
            hint="give --unconditional FILE.npz with one row for each condition that differs",
        )
    for arrays, option in ((unconditional, "--unconditional"), (rows, "--conditions")):
        if extra := set(arrays) - set(inputs):
            raise ConditionError(
                f"the model has no condition {sorted(extra)[0]!r}",
                where=option,
                hint=f"its conditions are: {', '.join(inputs) or 'none'}",
            )
    for name, array in unconditional.items():
        _check_array(name, inputs[name], array, "unconditional ")


def _check_array(name: str, value: ir.Value, rows: AnyArray, which: str) -> None:
    if value.dtype is not None and rows.dtype != value.dtype.numpy():
        raise ConditionError(
            f"the {which}data for {name!r} is {rows.dtype}; the model wants {value.dtype.numpy()}",
            where=f"input {name}",
            hint=f"convert it: array.astype(numpy.{value.dtype.numpy()})",
        )
    fixed = [] if value.shape is None else list(value.shape)[1:]
    fits = rows.ndim == len(fixed) + 1 and all(
        not isinstance(size, int) or size == actual for size, actual in zip(fixed, rows.shape[1:], strict=False)
    )
    if not fits or not rows.size:
        raise ConditionError(
            f"the {which}data for {name!r} has the shape {list(rows.shape)}; the model wants {value.shape}",
            where=f"input {name}",
            hint="the first dimension counts rows, the others must be the model's",
        )
    _check_finite(name, rows, which)


def _without_computed(inputs: ConditionInputs, computing: ConditionNetwork, rows: Conditions) -> ConditionInputs:
    """Return the inputs that have rows. Raises ConditionError for a network that computes or reads something else."""
    if unknown := [name for name in (*computing.outputs, *computing.shared) if name not in inputs]:
        raise ConditionError(
            f"the model has no condition {unknown[0]!r}, which the network that computes conditions gives or shares",
            hint=f"its conditions are: {', '.join(inputs) or 'none'}",
        )
    try:
        computing.all_rows(rows)
    except InputError as error:
        raise ConditionError(error.what, hint=error.hint) from error
    return {name: value for name, value in inputs.items() if name not in computing.outputs}


def _check_finite(name: str, rows: AnyArray, which: str) -> None:
    if (row := not_finite(rows)) is not None:
        raise ConditionError(
            f"the {which}data for {name!r} has NaN or infinite values in row {row}",
            where=f"input {name}",
            hint="look at the program that wrote it",
        )


def named_sizes(value: ir.Value, shape: Sequence[int]) -> dict[str, int]:
    """Return the sizes of an input's open dimensions behind its batch, by their names in the graph."""
    dims = list(value.shape or ())[1:]
    pairs = zip(dims, shape, strict=False)
    return {size.value: known for size, known in pairs if isinstance(size, ir.SymbolicDim) and size.value is not None}


def sizes_of_rows(inputs: ConditionInputs, rows: Conditions) -> dict[str, int]:
    """Return the sizes of open dimensions behind the rows, by their names in the graph.

    Rows that only a network reads which computes conditions have none there.
    """
    found: dict[str, int] = {}
    for name, array in rows.items():
        if name in inputs:
            found |= named_sizes(inputs[name], array.shape[1:])
    return {name: size for name, size in found.items() if name.isidentifier()}


def random_rows(
    inputs: ConditionInputs,
    shape: Sequence[int],
    rows: int,
    seed: int,
    named: Mapping[str, int] | None = None,
    labels: Conditions | None = None,
) -> Conditions:
    """Return standard normal rows for every float condition: enough for speed and size, not for quality.

    A condition that the model declares with one row, or as a number, gets one row. Open dimensions have the sizes that
    `named` has for their names (see `named_sizes`), else OPEN_TOKENS; extra channels have the other sizes of the
    sample, whose shape is `shape`. A mask, which is a condition with that word in its name, keeps every token.
    `labels` are rows of class labels that are taken as they are. Raises ConditionError for other integer conditions,
    whose range is unknown.
    """
    rng = streams.CONDITIONS.generator(seed)
    conditions: dict[str, AnyArray] = dict(labels or {})
    for name, value in ((name, value) for name, value in inputs.items() if name not in conditions):
        mask = "mask" in name.lower().split("_")
        if value.dtype is None or value.shape is None or not (mask or value.dtype.is_floating_point()):
            raise ConditionError(
                f"no random values can be drawn for the condition {name!r} ({value.dtype}{value.shape})",
                hint="give --conditions FILE.npz with real ones",
            )
        first, *rest = list(value.shape) or [1]
        if name == EXTRA_CHANNELS:
            rest = [own if isinstance(own, int) else size for own, size in zip(rest, shape, strict=True)]
        sizes = [1 if first == 1 else rows, *(_size(size, named or {}) for size in rest)]
        if prod(sizes) > MOST_RANDOM:
            raise ConditionError(
                f"the condition {name!r} has {prod(sizes)} values in {rows} rows, more than random ones are drawn for",
                hint="give --conditions FILE.npz with real ones, or look at the sizes in the model's configuration",
            )
        drawn = np.ones(sizes) if mask else rng.standard_normal(sizes)
        conditions[name] = drawn.astype(value.dtype.numpy())
    return conditions


def spread_labels(signature: Signature, rows: int) -> Conditions:
    """Return rows of the conditions that are known to be class labels: all classes, or as many as there are rows."""
    counts = {label.name: (min(rows, label.classes), label.classes) for label in signature.labels}
    return {name: np.arange(count) * classes // count for name, (count, classes) in counts.items()}


def _size(size: int | ir.SymbolicDim, named: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else open_size(size.value, named, OPEN_TOKENS)
