"""rotate_channels: turn the channels that a layer over tokens reads, so that no channel is loud any more.

    MatMul(x, w)    ->    MatMul(x H, H w)        H: Hadamard matrices of `block` channels side by side, H H = I

This is exact. A number of x H is a sum of `block` channels with signs: an outlier of one channel is spread over all of
them, and so is one of a row of w. It is QuaRot's rotation (arXiv 2404.00456) in the
places where a diffusion transformer has room for it:

- The values of an attention come from a layer, and its output goes into layers. Both of them take the rotation, head by
  head, since the softmax only adds tokens: nothing is left of it at run time (QuaRot, section 4, stage 1b).
- In front of all other layers x is rotated at run time, by a product in float with `block` columns. Norms whose factors
  depend on the timestep let no rotation through, which is why QuaRot's offline form is not possible here (SVDQuant,
  arXiv 2411.05007, section 4.1).

Layers that read one value share its rotation. `block` is the largest power of two that divides the channels, and at
most what the option says. The products with H are kept in float and are no layers of their own. A layer with one row
for each sample stays, and so do the layers of `islands`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.islands import Islands
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.attention import attention_of
from mezzotint.compiler.graph.nodes import Builder, Names, consumers, is_op, name_of, numpy_of, remove_dead, replace_use
from mezzotint.compiler.graph.ops import ROTATION, Layer, layers, over_tokens
from mezzotint.compiler.graph.require import producer, required, shape_of
from mezzotint.runtime.arrays import Doubles, Floats


@dataclass(frozen=True)
class RotateChannels(GraphPass):
    """Hadamard rotations of at most `block` channels, a power of two."""

    block: int = 64
    islands: tuple[str, ...] = ("first", "last")

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # sums of products are rounded

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            hint = "choose a power of two, such as 64"
            raise RecipeError(f"rotate_channels.block is {self.block}", where=self.name, hint=hint)

    def run(self, program: Program, context: Context) -> Program:
        graph, names = program.graph, Names(program.graph)
        every_layer = list(layers(graph))
        islands = Islands(program, every_layer, self.islands, self.name)
        wanted = [layer for layer in every_layer if over_tokens(layer) and islands.reason(layer) is None]
        readers: dict[ir.Value, list[Layer]] = {}
        for layer in wanted:
            readers.setdefault(layer.activations[0], []).append(layer)
        done = set(self._through_attention(graph, names, wanted, readers))
        rotated = 0
        for x, mine in readers.items():
            size = _block_of(x, self.block)
            if x in done or size < 2:
                continue
            turned = _rotated(graph, names, x, mine[0], size)
            for layer in mine:
                layer.node.replace_input_with(0, turned)
                _write(graph, names, layer, _turned_rows(_weight(layer), size))
            rotated += 1
        remove_dead(graph)
        said = f"{len(done)} outputs of attention rotated by the layers around it, {rotated} values at run time"
        return program.noted(said)

    def _through_attention(
        self, graph: ir.Graph, names: Names, wanted: list[Layer], readers: dict[ir.Value, list[Layer]]
    ) -> Iterator[ir.Value]:
        """Rotate the values of attentions in the layers around them; yield the outputs where that was possible."""
        makers = {layer.output: layer for layer in wanted}
        for softmax in [node for node in graph if is_op(node, "Softmax")]:
            found = attention_of(softmax)
            if found is None or found.value.rows is None:
                continue
            maker, mine = makers.get(found.value.rows), readers.get(found.output, [])
            size = _power_of_two(found.value.width, self.block)
            alone = len(consumers(found.value.rows)) == 1 and not found.value.rows.is_graph_output()
            whole = len(mine) == len(consumers(found.output)) and not found.output.is_graph_output()
            if maker is None or not mine or not alone or not whole or size < 2:
                continue
            _write(graph, names, maker, _turned_columns(_weight(maker), size))
            if maker.bias is not None:
                _write_bias(graph, names, maker, _turned_columns(numpy_of(maker.bias), size))
            for layer in mine:
                _write(graph, names, layer, _turned_rows(_weight(layer), size))
            yield found.output


def _power_of_two(channels: int, limit: int) -> int:
    """Return the largest power of two that divides the channels, at most the limit."""
    return min(channels & -channels, limit)


def _block_of(x: ir.Value, limit: int) -> int:
    channels = shape_of(x)[-1]
    return _power_of_two(channels, limit) if isinstance(channels, int) else 1


def _hadamard(size: int) -> Doubles:
    """Return Sylvester's symmetric matrix `[size, size]` of signs over the root of its size: its own inverse."""
    signs = [[1 - 2 * ((row & column).bit_count() % 2) for column in range(size)] for row in range(size)]
    matrix: Doubles = np.array(signs, np.float64) / np.sqrt(size)
    return matrix


def _turned_rows(weight: Floats, size: int) -> Floats:
    """Return H w for a weight `[inputs, outputs]`."""
    blocks = weight.astype(np.float64).reshape(-1, size, weight.shape[1])
    return (_hadamard(size) @ blocks).reshape(weight.shape).astype(np.float32)


def _turned_columns(weight: Floats, size: int) -> Floats:
    """Return w H for a weight `[inputs, outputs]` or a bias `[outputs]`."""
    blocks = weight.astype(np.float64).reshape(*weight.shape[:-1], -1, size)
    return (blocks @ _hadamard(size)).reshape(weight.shape).astype(np.float32)


def _weight(layer: Layer) -> Floats:
    """Return the weight as it is now: one layer may be rotated on both sides."""
    return numpy_of(required(layer.node.inputs[1], "a constant weight", layer.node))


def _write(graph: ir.Graph, names: Names, layer: Layer, weight: Floats) -> None:
    """Give a layer a weight of its own."""
    stem = name_of(layer.node.inputs[1])
    layer.node.replace_input_with(1, Builder(graph, names, layer.node).constant(f"{stem}_rotated", weight))


def _write_bias(graph: ir.Graph, names: Names, layer: Layer, bias: Floats) -> None:
    add, old = required(layer.bias_add, "the Add of its bias", layer.node), required(layer.bias, "a bias", layer.node)
    replace_use(add, old, Builder(graph, names, add).constant(f"{name_of(old)}_rotated", bias))


def _rotated(graph: ir.Graph, names: Names, x: ir.Value, layer: Layer, size: int) -> ir.Value:
    """Add x H in front of the first layer that reads it."""
    build, stem, dims = Builder(graph, names, layer.node), name_of(x), list(shape_of(x))
    blocks = build.constant(f"{stem}_blocks", np.array([*[0] * (len(dims) - 1), -1, size], np.int64))
    shape = [*dims[:-1], dims[-1] // size, size]
    parts = build.op("Reshape", [x, blocks], f"{stem}_in_blocks", like=x, shape=shape)
    turn = build.constant(f"{stem}_rotation", _hadamard(size).astype(np.float32))
    made = build.op("MatMul", [parts, turn], f"{stem}_turned", like=x, shape=shape)
    producer(made).metadata_props[ROTATION] = layer.name
    flat = build.constant(f"{stem}_flat", np.array([*[0] * (len(dims) - 1), dims[-1]], np.int64))
    return build.op("Reshape", [made, flat], f"{stem}_rotated", like=x)
