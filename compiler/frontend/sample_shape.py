"""The axis of a sample's channels, and the sizes of the sample that the compiler calibrates and checks with.

A sample has its channels along axis 1 (images, audio, video) or along the last axis (tokens). `[B, C, L]` and
`[B, N, C]` have the same rank, so for a sample of rank 3 the graph decides: its first convolution reads channels along
axis 1, its first linear layer along the last axis, both seen through transposes. A graph that does neither is decided
by its sizes: channels are fixed, the length of audio or the number of tokens may be open. `channel_axis` says it where
nothing does, and for video `[B, T, C, H, W]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from mezzotint.runtime.signature import CHANNELS_FIRST, Signature

from ..errors import ModelError, SignatureError
from ..graph.nodes import consumers, is_constant, is_op, name_of, numpy_of

_Axes = tuple[int | None, ...]
"""For each axis of a value the axis of the sample that it is, None for an axis of its own."""
AXIS_1 = ("Conv", "ConvTranspose", "GroupNormalization", "InstanceNormalization", "BatchNormalization")
LAST_AXIS = ("MatMul", "Gemm", "LayerNormalization", "RMSNormalization")
SAME_AXES = (
    *("Add", "Sub", "Mul", "Div", "Cast", "Identity", "Concat", "Pad", "Slice", "Dropout"),
    *("Sigmoid", "Tanh", "Relu", "Gelu", "Clip", "Neg", "Sqrt", "Exp"),
)
"""Operations whose output has the axes of their inputs."""


def settle_channel_axis(graph: ir.Graph, signature: Signature, axis: int | None, where: str) -> Signature:
    """Return the signature with the axis of the sample's channels: `axis` where it is given, -1 for the last one.

    Raises SignatureError for an axis that the sample does not have, and for a sample of rank 3 that may be either.
    """
    sample = sample_of(graph, signature)
    rank = len(sample.shape or [None] * 4)
    if axis is not None:
        positive = axis + rank if axis < 0 else axis
        if not CHANNELS_FIRST <= positive < rank:
            raise SignatureError(
                f"axis {axis} of the sample {signature.sample!r} {sample.shape} cannot be that of its channels",
                where=where,
                hint=f"--channel-axis is 1 to {rank - 1}, or -1 for the last one",
            )
        return replace(signature, channel_axis=positive)
    if signature.channel_axis != CHANNELS_FIRST or rank != 3:
        return signature
    found = _first_reader(sample) or _only_fixed(sample)
    if found is None:
        raise SignatureError(
            f"the sample {signature.sample!r} {sample.shape} may be [batch, channels, length] or "
            "[batch, tokens, channels]",
            where=where,
            hint="say which axis has the channels: --channel-axis 1, or --channel-axis 2",
        )
    return replace(signature, channel_axis=found)


def settle_sample_shape(
    graph: ir.Graph, signature: Signature, size: Sequence[int] | None, where: str
) -> tuple[int, ...]:
    """Return the sizes of the sample behind its batch. `size` has those that the graph leaves open.

    It has all sizes beside the channels, or the open ones only; one number is enough for a square image. Raises
    ModelError where a size is missing, or is not the graph's.
    """
    value = sample_of(graph, signature)
    declared = [d if isinstance(d, int) else None for d in (value.shape or [None] * 4)][1:]
    sides = [i for i in range(len(declared)) if i != signature.channel_axis - 1]
    still_open = [i for i in sides if declared[i] is None]
    given = (size[0], size[0]) if size is not None and len(size) == 1 and len(sides) == 2 else tuple(size or ())
    at = sides if len(given) == len(sides) else still_open
    wanted = dict(zip(at, given, strict=False)) if len(at) == len(given) else {}
    chosen = [wanted.get(i) if known is None else known for i, known in enumerate(declared)]
    shape = tuple(known for known in chosen if known is not None)
    if len(shape) < len(chosen):
        raise ModelError(
            f"the sample {signature.sample!r} has the open shape {value.shape}",
            where=where,
            hint=f"give {_asked(sides, still_open)} (the number of channels must be in the graph)",
        )
    if size is not None and (len(at) != len(given) or any(shape[i] != side for i, side in wanted.items())):
        known_sides = "x".join(str(side) for side in signature.sides(shape))
        raise ModelError(
            f"the model's samples are {known_sides}, not {'x'.join(map(str, given))}", where=where, hint="drop --size"
        )
    return shape


def image_sides(size: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return (height, width) of an image's size, where one number is a square. Raises ModelError for other sizes."""
    if size is not None and len(size) not in (1, 2):
        raise ModelError(
            f"the model's samples are images, not {'x'.join(map(str, size))}", hint="give height and width: --size HxW"
        )
    return None if size is None else (size[0], size[-1])


def sample_of(graph: ir.Graph, signature: Signature) -> ir.Value:
    """Return the graph input that is the sample."""
    return next(v for v in graph.inputs if name_of(v) == signature.sample)


def _asked(sides: Sequence[int], still_open: Sequence[int]) -> str:
    if len(sides) == 2:
        return "the height and width to calibrate at: --size HxW"
    if not still_open:
        return "the channels a size"
    return "the sizes to calibrate at: --size " + "x".join(["N"] * len(still_open))


def _only_fixed(sample: ir.Value) -> int | None:
    """Return the axis behind the batch with the only fixed size, None where both are fixed or open."""
    fixed = [axis for axis, size in enumerate(sample.shape or ()) if axis and isinstance(size, int)]
    return fixed[0] if len(fixed) == 1 else None


def _first_reader(sample: ir.Value) -> int | None:
    """Return the axis that the layer nearest to the sample reads as channels, None where none is seen."""
    waiting: list[tuple[ir.Value, _Axes]] = [(sample, tuple(range(len(sample.shape or ()))))]
    seen = {name_of(sample)}
    while waiting:
        value, axes = waiting.pop(0)
        for node in consumers(value):
            if (found := _read_as_channels(node, value, axes)) is not None:
                return found
            moved = _moved(node, value, axes)
            for out in node.outputs[:1]:
                if moved is not None and name_of(out) not in seen:
                    seen.add(name_of(out))
                    waiting.append((out, moved))
    return None


def _read_as_channels(node: ir.Node, value: ir.Value, axes: _Axes) -> int | None:
    if node.inputs[0] is not value:
        return None
    if is_op(node, *AXIS_1):
        return axes[1] if len(axes) > 1 else None
    if is_op(node, *LAST_AXIS) and (node.op_type != "MatMul" or is_constant(node.inputs[1])):
        return axes[-1] or None
    return None


def _moved(node: ir.Node, value: ir.Value, axes: _Axes) -> _Axes | None:
    """Return the axes of a node's output, None where they are not known."""
    if is_op(node, *SAME_AXES):
        shape = node.outputs[0].shape
        return axes if shape is None or len(shape) == len(axes) else None
    if is_op(node, "Transpose"):
        order = node.attributes.get_ints("perm", None) or tuple(range(len(axes)))[::-1]
        return tuple(axes[i] for i in order)
    if is_op(node, "Unsqueeze", "Squeeze") and node.inputs[0] is value and len(node.inputs) > 1:
        if not is_constant(node.inputs[1]):
            return None
        at = [int(i) for i in numpy_of(node.inputs[1]).reshape(-1)]  # type: ignore[arg-type]
        if node.op_type == "Squeeze":
            gone = {i % len(axes) for i in at}
            return tuple(axis for i, axis in enumerate(axes) if i not in gone)
        rank = len(axes) + len(at)
        new, rest = {i % rank for i in at}, iter(axes)
        return tuple(None if i in new else next(rest) for i in range(rank))
    return None
