"""Networks that take or predict other channels than those of the image.

    takes 9, predicts 4     an inpainting network: 4 channels of the image, and 5 more, which become a condition
    takes 3, predicts 6     learned variances behind the prediction; they are cut off, because no sampler reads them

The image's channels come first on both sides, as in diffusers' pipelines. The rewritten graph has the image as its
sample, and the other channels as the input `extra_channels` `[B, C', H, W]`, which it puts behind them. Samples of
other ranks are split in the same way, along the axis of their channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from mezzotint.runtime.sampling.schedule import LEARNED, Schedule
from mezzotint.runtime.signature import EXTRA_CHANNELS, Signature

from ..errors import ModelError
from ..graph import weight_store as store
from ..graph.nodes import Builder, Names, name_of
from .sample_shape import sample_of


@dataclass(frozen=True)
class Channels:
    """How many channels belong to the image, how many more the network takes, and how many it predicts in all."""

    image: int
    extra: int
    predicted: int


def network_channels(
    taken: int, predicted: int, schedule: Schedule, image: int | None = None, where: str = "the model"
) -> Channels:
    """Return the channels of a network; `image` where the caller knows it. Raises ModelError if they do not fit."""
    learned = schedule.variance_type in LEARNED and predicted != taken and predicted % 2 == 0
    if image is None:
        image = predicted // 2 if learned else taken if predicted == 2 * taken else predicted
    if not 1 <= image <= taken or predicted not in (image, 2 * image):
        raise ModelError(
            f"the model takes {taken} channels and predicts {predicted}: no image of {image} channels fits that",
            where=where,
            hint="name the output that predicts (--output-name), or give the channels of the image (--channels)",
        )
    return Channels(image, taken - image, predicted)


def split_channels(
    model: ir.Model, signature: Signature, schedule: Schedule, image: int | None = None, where: str = "the model"
) -> Signature:
    """Edit a graph so that its sample and its prediction have the channels of the image; return its signature.

    A graph whose channels are not known is left alone. Raises ModelError, see `network_channels`.
    """
    graph = model.graph
    sample, axis = sample_of(graph, signature), signature.channel_axis
    rank = None if sample.shape is None else len(sample.shape)
    taken = None if rank is None else _size(sample.shape, rank, axis)
    predicted = None if rank is None else _predicted(model, signature.output, rank, axis)
    if taken is None or predicted is None or EXTRA_CHANNELS in signature.conditions:
        return signature
    found = network_channels(taken, predicted, schedule, image, where)
    if found.predicted > found.image:
        _keep_image(graph, signature.output, found, axis)
    if not found.extra:
        return signature
    if any(name_of(v) == EXTRA_CHANNELS for v in graph.inputs):
        raise ModelError(f"the model has an input that is called {EXTRA_CHANNELS!r}", where=where, hint="rename it")
    _join(graph, sample, found, axis)
    return replace(signature, conditions=(*signature.conditions, EXTRA_CHANNELS))


def _size(shape: ir.Shape | None, rank: int, axis: int) -> int | None:
    size = None if shape is None or len(shape) != rank else shape[axis]
    return size if isinstance(size, int) else None


def _predicted(model: ir.Model, output: str, rank: int, axis: int) -> int | None:
    """Return the channels of the prediction, by ONNX's shape inference where the file does not say them."""
    value = next(v for v in model.graph.outputs if name_of(v) == output)
    if (known := _size(value.shape, rank, axis)) is not None:
        return known
    proto = ir.to_proto(store.bare(model))
    for info in proto.graph.output:  # a wrong rank there would stop the inference
        info.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        return None
    info = next(v for v in inferred.graph.output if v.name == output)
    dims = info.type.tensor_type.shape.dim
    return int(dims[axis].dim_value) or None if len(dims) == rank else None


def _keep_image(graph: ir.Graph, output: str, channels: Channels, axis: int) -> None:
    """Cut the prediction to the channels of the image."""
    value = next(v for v in graph.outputs if name_of(v) == output)
    node = value.producer()
    if node is None:  # the prediction is an input: not a network
        return
    shape = None if value.shape is None else _resized(value.shape, channels.image, axis)
    build = Builder(graph, Names(graph), after=node)
    limits = [
        build.constant(f"{output}_{what}", np.array([at]))
        for what, at in (("begin", 0), ("end", channels.image), ("axis", axis))
    ]
    image = build.op("Slice", [value, *limits], f"{output}_image", dtype=value.dtype, shape=shape)
    graph.outputs[list(graph.outputs).index(value)] = image
    value.name, image.name = f"{output}_with_variance", output


def _join(graph: ir.Graph, sample: ir.Value, channels: Channels, axis: int) -> None:
    """Make the sample the image alone, and join the extra channels to it in front of the first reader."""
    whole = ir.Shape(sample.shape or ())
    extra = ir.Value(
        name=EXTRA_CHANNELS,
        shape=ir.Shape(_resized(whole, channels.extra, axis)),
        type=None if sample.type is None else ir.TensorType(sample.type.dtype),
    )
    build = Builder(graph, Names(graph), graph[0])
    joined = build.op("Concat", [sample, extra], f"{name_of(sample)}_and_extra", like=sample, attributes={"axis": axis})
    for node in [use.node for use in sample.uses()]:
        if node is joined.producer():
            continue
        for i, value in enumerate(node.inputs):
            if value is sample:
                node.replace_input_with(i, joined)
    sample.shape = ir.Shape(_resized(whole, channels.image, axis))
    graph.inputs.append(extra)


def _resized(shape: ir.Shape, channels: int, axis: int) -> list[int | ir.SymbolicDim]:
    """Return the sizes of a shape, with so many channels."""
    sizes = list(shape)
    sizes[axis] = channels
    return sizes
