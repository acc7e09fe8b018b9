"""lower_transposed: rewrite transposed convolutions into convolutions, which have an integer kernel.

With stride s, output position t = s m + r (r is its phase) sums the taps k of the kernel with k = s j + r:

    y[s m + r] = sum_j x[m - j] w[s j + r]                 j < q = ceil(K / s)

So all s phases are channels of one convolution with q taps, which reads each tap once, and DepthToSpace interleaves
them. What the pads cut off is not computed where whole positions m are cut; a Slice cuts the rest:

    ConvTranspose(x, w, b)  ->  Conv(x, w as [s s C, ...], b repeated) -> DepthToSpace (CRD) -> Slice

Without a stride, or where s divides the pads, there is no Slice; stride 1 needs no DepthToSpace. One or two dimensions;
with one, or with two different strides, a Reshape, a Transpose and a Reshape take DepthToSpace's place. Groups,
dilations (zeros between the taps), output_padding and auto_pad are covered.

onnxruntime's float kernel is fast where the taps do not overlap (2x2 with stride 2), and slow where they do. Measured
between two convolutions, one thread, w8a8, time of the whole against the float kernel in the same file: 4x4 with stride
2 and 32, 64, 128 and 256 channels 0.97, 0.87, 0.25 and 0.51; 3x3 with 64, 128 and 256 channels 1.19, 1.04 and 0.92; 2x2
with 128, 256 and 512 channels 1.45, 0.97 and 0.70. So a layer is rewritten where each output sums at least `products`
products, or half as many where each phase has two taps or more and none of zeros. Other forms were slower: zeros
between the pixels and an ordinary convolution 1.2 to 1.5 times the float kernel's time, 3x3 kernels that need no Slice
up to twice that of 2x2 ones.

A layer that is kept in float as `first`, `second`, `penultimate` or `last` (compiler/core/islands.py) keeps its kernel,
too. That, and what cannot be written (computed weights, three dimensions, open sizes with two different strides, pads
larger than the kernel), is in the program's list of refusals, with the reason. Where it is no island, choose_scales and
insert_qdq give it weights of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.islands import Islands
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import (
    Builder,
    Names,
    initializer,
    is_constant,
    is_op,
    known_ints,
    name_of,
    numpy_of,
    remove_dead,
    replace_value,
)
from mezzotint.compiler.graph.ops import layers, transposed_layer
from mezzotint.compiler.graph.require import inputs, shape_of
from mezzotint.runtime.arrays import Floats

_ROLES = ("first", "second", "penultimate", "last")


@dataclass(frozen=True)
class LowerTransposed(GraphPass):
    """Transposed convolutions as convolutions.

    - `products`: as above; 0 rewrites every layer that is no island.
    """

    products: int = 256

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # sums in another order

    def __post_init__(self) -> None:
        if self.products < 0:
            raise RecipeError(f"{self.name}.products is {self.products}", where=self.name, hint="choose 0 or more")

    def run(self, program: Program, context: Context) -> Program:
        graph, names = program.graph, Names(program.graph)
        refused: dict[str, str] = {}
        transposed = []
        for node in graph:
            if (layer := transposed_layer(node)) is not None:
                transposed.append(layer)
            elif is_op(node, "ConvTranspose"):
                refused[node.name or name_of(node.outputs[0])] = "its weights are computed"
        if not transposed and not refused:
            return program.noted("no transposed convolution")
        islands = Islands(program, [*layers(graph), *transposed], _ROLES, self.name)
        kept = {layer.name: islands.reason(layer) for layer in transposed}
        lowered = 0
        for layer in transposed:
            spec = kept[layer.name] or _spec(layer.node)
            if isinstance(spec, _Spec) and self._is_small(layer.node, spec):
                spec = f"it sums fewer than {self.products} products for each output: float is as fast"
            if not isinstance(spec, _Spec):
                refused[layer.name] = spec
                continue
            _lower(graph, names, layer.node, spec, context.folder)
            lowered += 1
        remove_dead(graph)
        note = f"{lowered} transposed convolutions became convolutions"
        if refused:
            note += "; left: " + ", ".join(f"{name} ({reason})" for name, reason in refused.items())
        return replace(program, refused={**program.refused, **refused}, note=note)

    def _is_small(self, node: ir.Node, spec: _Spec) -> bool:
        """Return whether an integer kernel would not be faster; see the module's docstring."""
        channels, _, *kernel = shape_of(node.inputs[1]).numpy()
        strides = [axis.stride for axis in spec.axes]
        products = channels // spec.groups * float(np.prod(kernel)) / float(np.prod(strides))
        dense = all(axis.phase_taps > 1 and axis.taps % axis.stride == 0 for axis in spec.axes)
        return products * (1 + dense) < self.products


@dataclass(frozen=True)
class _Axis:
    """One spatial axis: stride, taps of the kernel with dilation, taps of a phase, pads of the Conv, cuts behind it."""

    stride: int
    taps: int
    phase_taps: int
    pads: tuple[int, int]
    cuts: tuple[int, int]


@dataclass(frozen=True)
class _Spec:
    axes: tuple[_Axis, ...]
    dilations: tuple[int, ...]
    groups: int
    sizes: tuple[int, ...] | None


def _spec(node: ir.Node) -> _Spec | str:
    """Return the numbers of the rewrite, or why it is not possible."""
    x, weight = inputs(node, 2)
    if len(node.inputs) > 2 and node.inputs[2] is not None and not is_constant(node.inputs[2]):
        return "its bias is computed"
    rank = len(numpy_of(weight).shape) - 2
    if rank not in (1, 2):
        return f"it has {rank} spatial dimensions, 1 and 2 are covered"
    kernel = numpy_of(weight).shape[2:]
    strides, dilations = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
    sizes = known_ints(x.shape, range(2, 2 + rank))
    if len(set(strides)) > 1 and sizes is None:
        return "its strides differ, and its sizes are open"
    pads = _pads(node, rank, strides, sizes)
    if isinstance(pads, str):
        return pads
    extra = _ints(node, "output_padding", [0] * rank)
    axes = []
    for i in range(rank):
        taps, s, begin, end = dilations[i] * (kernel[i] - 1) + 1, strides[i], pads[i], pads[rank + i]
        phase_taps = -(-taps // s)
        first, last = begin // s, (taps - 1 + extra[i] - end) // s  # positions m, the last one from the input's end
        before = phase_taps - 1 - first
        cuts = (begin - first * s, (last + 1) * s - (taps + extra[i] - end))
        if before < 0 or last < 0 or begin < 0:
            return "its pads are larger than its kernel, or negative"
        axes.append(_Axis(s, taps, phase_taps, (before, last), cuts))
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return _Spec(tuple(axes), tuple(dilations), groups, None if sizes is None else tuple(sizes))


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def _pads(node: ir.Node, rank: int, strides: list[int], sizes: list[int] | None) -> list[int] | str:
    """Return the pads, all begins before all ends; those of auto_pad and output_shape are computed as ONNX says."""
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if auto == "VALID":
        return [0] * (2 * rank)
    if auto == "NOTSET" and "output_shape" not in node.attributes:
        return _ints(node, "pads", [0] * (2 * rank))
    kernel = numpy_of(inputs(node, 2)[1]).shape[2:]
    dilations, extra = _ints(node, "dilations", [1] * rank), _ints(node, "output_padding", [0] * rank)
    shape = _ints(node, "output_shape", [])
    if shape and sizes is None:
        return "its output has a fixed size, and its input an open one"
    begins, ends = [], []
    for i in range(rank):
        taps = dilations[i] * (kernel[i] - 1) + 1
        if shape and sizes is not None:
            total = strides[i] * (sizes[i] - 1) + extra[i] + taps - shape[-rank:][i]
        else:  # the output is `stride` times as large
            total = taps + extra[i] - strides[i]
        if total < 0:
            return "its output is larger than its kernel reaches"
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return [*begins, *ends]


def _lower(graph: ir.Graph, names: Names, node: ir.Node, spec: _Spec, folder: Path) -> None:
    x, weight, out = node.inputs[0], inputs(node, 2)[1], node.outputs[0]
    stem, name = name_of(out), node.name
    build = Builder(graph, names, before=node)
    rows = _phases(numpy_of(weight), spec)
    kept = names.unique(f"{name_of(weight)}_phases")
    weights = initializer(graph, kept, store.kept(rows, kept, folder))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    phases = int(np.prod([axis.stride for axis in spec.axes]))
    channels = len(rows) // phases
    if bias is not None:
        bias = build.constant(f"{name_of(bias)}_phases", np.repeat(numpy_of(bias), phases))
    rank, batch = len(spec.axes), None if x is None or x.shape is None else x.shape[0]
    reads = [None] * rank if spec.sizes is None else list(spec.sizes)
    made = [None if n is None else n + sum(a.pads) - a.phase_taps + 1 for n, a in zip(reads, spec.axes, strict=True)]
    attributes = {
        "kernel_shape": [axis.phase_taps for axis in spec.axes],
        "pads": [axis.pads[0] for axis in spec.axes] + [axis.pads[1] for axis in spec.axes],
        "group": spec.groups,
    }
    node.name = names.unique(f"{name}_transposed") if name else ""
    value = build.op(
        "Conv",
        [x, weights, bias],
        f"{stem}_phases",
        dtype=ir.DataType.FLOAT,
        shape=[batch, len(rows), *made],
        attributes=attributes,
        name=name or None,
    )
    wide = [None if n is None else n * a.stride for n, a in zip(made, spec.axes, strict=True)]
    if phases > 1:
        value = _interleaved(build, value, stem, spec, [batch, channels, *wide], made)
    cut = [i for i, axis in enumerate(spec.axes) if any(axis.cuts)]
    if cut:
        far = np.iinfo(np.int64).max
        starts = [spec.axes[i].cuts[0] for i in cut]
        ends = [-spec.axes[i].cuts[1] or far for i in cut]
        limits = [("starts", starts), ("ends", ends), ("axes", [2 + i for i in cut])]
        constants = [build.constant(f"{stem}_{n}", np.array(v, np.int64)) for n, v in limits]
        value = build.op("Slice", [value, *constants], f"{stem}_cut", like=out)
    value.shape = out.shape if out.shape is not None else value.shape
    replace_value(out, value)
    graph.remove(node, safe=True)


def _phases(weight: Floats, spec: _Spec) -> Floats:
    """Return `[C_out phases, C_in / groups, taps of a phase ...]` of a weight `[C_in, C_out / groups, taps ...]`.

    The phases of an output channel are next to each other. A Conv reads its taps in the other direction.
    """
    inner, outer = weight.shape[:2]
    dense = np.zeros([inner, outer, *(a.phase_taps * a.stride for a in spec.axes)], np.float32)
    dense[
        (slice(None), slice(None), *(slice(0, a.taps, d) for a, d in zip(spec.axes, spec.dilations, strict=True)))
    ] = weight
    rank = len(spec.axes)
    parts = dense.reshape(
        [spec.groups, inner // spec.groups, outer, *(n for a in spec.axes for n in (a.phase_taps, a.stride))]
    )
    taps, phases = [3 + 2 * i for i in range(rank)], [4 + 2 * i for i in range(rank)]
    turned = np.flip(parts.transpose([0, 2, *phases, 1, *taps]), axis=tuple(range(-rank, 0)))
    rows: Floats = turned.reshape([-1, inner // spec.groups, *(a.phase_taps for a in spec.axes)])
    return np.ascontiguousarray(rows, np.float32)


def _interleaved(
    build: Builder, value: ir.Value, stem: str, spec: _Spec, shape: list[object], sizes: list[int | None]
) -> ir.Value:
    """Write what moves the phases of each channel next to each other."""
    strides, dtype, channels = [axis.stride for axis in spec.axes], ir.DataType.FLOAT, shape[1]
    if len(strides) == 2 and strides[0] == strides[1]:
        attributes = {"blocksize": strides[0], "mode": "CRD"}
        return build.op("DepthToSpace", [value], f"{stem}_wide", dtype=dtype, shape=shape, attributes=attributes)
    rank = len(strides)
    apart = [0, channels, *strides, *(sizes if None not in sizes else [-1] * rank)]
    order = [0, 1, *(axis for i in range(rank) for axis in (2 + rank + i, 2 + i))]
    joined = [0, channels, *(-1 if n is None else n for n in shape[2:])]
    parts = build.op("Reshape", [value, _shape(build, stem, "apart", apart)], f"{stem}_apart", dtype=dtype)
    turned = build.op("Transpose", [parts], f"{stem}_turned", dtype=dtype, attributes={"perm": order})
    return build.op(
        "Reshape", [turned, _shape(build, stem, "joined", joined)], f"{stem}_wide", dtype=dtype, shape=shape
    )


def _shape(build: Builder, stem: str, preferred: str, sizes: list[object]) -> ir.Value:
    return build.constant(f"{stem}_{preferred}_shape", np.array(sizes, np.int64))
