"""The batch of a graph: the first dimensions of its inputs, as far as the file fixes them."""

from __future__ import annotations

import onnx_ir as ir

from mezzotint.runtime.signature import Signature

from ..errors import ModelError
from ..graph.nodes import name_of


def settle_batch(graph: ir.Graph, signature: Signature, where: str) -> None:
    """Write the batch that one input fixes into the sample and the output, where these leave it open.

    An export that opens the batch of the sample only leaves the timestep at the size of its example. Such a graph is
    one for that batch. A first dimension of 1 fixes nothing: one timestep, or one row of a condition, serves all
    samples. Raises ModelError for inputs of two different batches.
    """
    inputs = {name_of(v): v for v in graph.inputs}
    fixed = {name: size for name, v in inputs.items() if (size := _first(v)) is not None}
    own = fixed.get(signature.sample)
    others = {name: size for name, size in fixed.items() if name != signature.sample and size != 1}
    wanted = own if own is not None else next(iter(others.values()), None)
    if wanted is None:
        return
    wrong = next((name for name, size in others.items() if size != wanted), None)
    if wrong is not None:
        other = signature.sample if own is not None else next(iter(others))
        raise ModelError(
            f"the inputs have different batches: {wrong!r} is {inputs[wrong].shape}, {other!r} {inputs[other].shape}",
            where=where,
            hint="export the model with one batch size, or with an open one, for all inputs",
        )
    if own is None:
        outputs = [v for v in graph.outputs if name_of(v) == signature.output]
        for value in (inputs[signature.sample], *outputs):
            if value.shape is not None and len(value.shape):
                value.shape = ir.Shape([wanted, *list(value.shape)[1:]])


def _first(value: ir.Value) -> int | None:
    """Return the first dimension of a value where it is a number."""
    if value.shape is None or not len(value.shape) or value.const_value is not None:
        return None
    size = value.shape[0]
    return size if isinstance(size, int) else None
