"""The blocks of random networks, with and without module names, in float and with quantizers."""

from __future__ import annotations

import random
import re

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.blocks import Block, find_blocks
from tests.helpers.tiny import tiny_model

PARTS = ("residual", "shortcut", "attention", "transformer", "split", "downsample")
ALONE = ("split", "downsample")
KERNEL = "<pads = [1, 1, 1, 1]>"
CONSTANTS = {"image": (4, 4, 3, 3), "bias": (4,), "square": (8, 8), "vector": (4, 4), "one": (4, 4, 1, 1), "scale": ()}


def parsed(lines: list[str]) -> ir.Model:
    """The graph of some lines of text, with the CONSTANTS; names of nodes may hold slashes and dots."""
    plain = [
        re.sub(r"^\[(.*?)\]", lambda m: f"[{m[1].replace('/', '_S_').replace('.', '_D_')}]", line) for line in lines
    ]
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
    net (float[1,4,8,8] sample, float[1,4] waves) => (float[1,4,8,8] epsilon) <uint8 zero = {7}> {
    """
        + "\n".join(plain)
        + "}"
    )
    for node in model.graph:
        node.name = (node.name or "").replace("_S_", "/").replace("_D_", ".")
        for value in node.inputs:
            if value is not None and value.name in CONSTANTS and value.const_value is None:
                value.const_value = ir.tensor(np.full(CONSTANTS[value.name], 0.1, np.float32), name=value.name)
                value.shape, value.type = ir.Shape(CONSTANTS[value.name]), ir.TensorType(ir.DataType.FLOAT)
                model.graph.register_initializer(value)
    return model


class Net:
    """A network as text, written part by part, with what its blocks should be."""

    def __init__(self, seed: int, quantized: bool) -> None:
        self.rng, self.quantized = random.Random(seed), quantized
        self.lines: list[str] = []
        self.count = 0
        self.modules: dict[str, list[str]] = {}  # of each block the layers
        self.regions: list[list[str]] = []  # of each block by dominators
        self.op("time", "Sin", "waves", name="time")
        x = self.layer("time_embedding/linear", "Gemm", "time", "vector", "emb")
        self.op("silu", "Sigmoid", x, name="temb")
        self.alone("time_embedding/linear")
        x = self.conv("conv_in", "sample", alone=True)
        for i in range(self.rng.randint(1, 5)):
            kind = self.rng.choice(PARTS)
            before = len(self.modules)
            x = getattr(self, kind)(f"{kind}s.{i}", x)
            assert len(self.modules) > before
        self.lines.append(f"[conv_out] epsilon = Conv {KERNEL} ({self.q(x)}, image, bias)")
        self.alone("conv_out")

    @property
    def model(self) -> ir.Model:
        return parsed(self.lines)

    def op(self, node: str, op: str, inputs: str, name: str = "", attributes: str = "") -> str:
        self.count += 1
        out = name or f"v{self.count}"
        self.lines.append(f"[{node}] {out} = {op} {attributes} ({inputs})")
        return out

    def q(self, value: str) -> str:
        if not self.quantized:
            return value
        integers = self.op(f"q{self.count}", "QuantizeLinear", f"{value}, scale, zero")
        return self.op(f"dq{self.count}", "DequantizeLinear", f"{integers}, scale, zero")

    def alone(self, layer: str) -> None:
        self.modules[layer] = [layer]
        self.regions.append([layer])

    def block(self, module: str, layers: list[str], regions: list[list[str]] | None = None) -> None:
        self.modules[module] = layers
        self.regions += regions or [layers]

    def layer(self, node: str, op: str, x: str, weight: str, name: str = "") -> str:
        return self.op(node, op, f"{self.q(x)}, {self.q(weight)}", name)

    def conv(self, node: str, x: str, weight: str = "image", alone: bool = False) -> str:
        attributes = KERNEL if weight == "image" else ""
        out = self.op(node, "Conv", f"{self.q(x)}, {self.q(weight)}, bias", attributes=attributes)
        if alone:
            self.alone(node)
        return self.q(out)

    def residual(self, m: str, x: str, shortcut: bool = False) -> str:
        a = self.conv(f"{m}/conv1/Conv", self.op(f"{m}/act/Sigmoid", "Sigmoid", x))
        t = self.layer(f"{m}/temb/Gemm", "Gemm", "temb", "vector")
        a = self.op(f"{m}/Add", "Add", f"{a}, {t}")
        b = self.conv(f"{m}/conv2/Conv", self.op(f"{m}/act_1/Sigmoid", "Sigmoid", a))
        layers = [f"{m}/conv1/Conv", f"{m}/temb/Gemm", f"{m}/conv2/Conv"]
        if shortcut:
            x = self.conv(f"{m}/conv_shortcut/Conv", x, "one")
            layers.append(f"{m}/conv_shortcut/Conv")
        self.block(m, layers)
        return self.op(f"{m}/Add_1", "Add", f"{x}, {b}")

    def shortcut(self, m: str, x: str) -> str:
        return self.residual(m, x, shortcut=True)

    def attention(self, m: str, x: str, listed: bool = True) -> str:
        q, k, v = (self.layer(f"{m}/to_{n}/MatMul", "MatMul", x, "square") for n in "qkv")
        scores = self.op(f"{m}/MatMul", "MatMul", f"{self.q(q)}, {self.q(k)}")
        mixed = self.op(f"{m}/MatMul_1", "MatMul", f"{self.op(f'{m}/Softmax', 'Softmax', scores)}, {self.q(v)}")
        out = self.layer(f"{m}/to_out/MatMul", "MatMul", mixed, "square")
        if listed:
            self.block(m, self.attention_layers(m))
        return self.op(f"{m}/Add", "Add", f"{out}, {x}") if listed else out

    @staticmethod
    def attention_layers(m: str) -> list[str]:
        names = (*(f"to_{n}/MatMul" for n in "qkv"), "MatMul", "MatMul_1", "to_out/MatMul")
        return [f"{m}/{name}" for name in names]

    def transformer(self, m: str, x: str) -> str:
        a = self.op(f"{m}/Add", "Add", f"{x}, {self.attention(f'{m}/attn', x, listed=False)}")
        h = self.op(f"{m}/ff/Relu", "Relu", self.layer(f"{m}/ff/net.0/MatMul", "MatMul", a, "square"))
        out = self.layer(f"{m}/ff/net.2/MatMul", "MatMul", h, "square")
        inner = [self.attention_layers(f"{m}/attn"), [f"{m}/ff/net.0/MatMul", f"{m}/ff/net.2/MatMul"]]
        self.block(m, [*inner[0], *inner[1]], inner)
        return self.op(f"{m}/Add_1", "Add", f"{a}, {out}")

    def split(self, m: str, x: str) -> str:
        """The halves of a convolution: two layers whose sum is no residual one."""
        first, second = (self.conv(f"{m}/Conv{n}", x, alone=True) for n in ("", "_half"))
        return self.op(f"{m}/Add", "Add", f"{first}, {second}")

    def downsample(self, m: str, x: str) -> str:
        return self.op(f"{m}/Resize", "Relu", self.conv(f"{m}/conv/Conv", x, alone=True))


def check(model: ir.Model, blocks: list[Block]) -> None:
    """Fail unless every layer is in one block, no node in two, and the order is executable."""
    nodes = [node for block in blocks for node in block.nodes]
    assert len(nodes) == len(set(nodes))
    layers = {n for n in model.graph if n.op_type in ("Conv", "Gemm", "MatMul")}
    assert {n for n in nodes if n.op_type in ("Conv", "Gemm", "MatMul")} == layers
    place = {node: i for i, block in enumerate(blocks) for node in block.nodes}
    reached: dict[ir.Node, int] = {}  # the last block that a node depends on
    for node in model.graph:
        before = [reached[p] for v in node.inputs if v is not None and (p := v.producer()) is not None]
        reached[node] = max([place.get(node, -1), *before])
        assert node not in place or reached[node] == place[node], node.name
    for block in blocks:
        inside = set(block.nodes)
        assert list(block.nodes) == [n for n in model.graph if n in inside]
        made = {v for n in block.nodes for v in n.outputs}
        read = {v for n in block.nodes for v in n.inputs if v is not None and v.const_value is None}
        assert set(block.inputs) == read - made and set(block.activations) <= set(block.inputs)
        assert set(block.outputs) == {
            v for v in made if v.is_graph_output() or any(u.node not in inside for u in v.uses())
        }


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_of_a_random_network(seed: int, quantized: bool) -> None:
    net = Net(seed, quantized)
    model = net.model
    blocks = find_blocks(model)
    check(model, blocks)
    assert {b.name: set(b.layers) for b in blocks} == {name: set(layers) for name, layers in net.modules.items()}
    names = {node: node.name for node in model.graph}
    for node in model.graph:
        node.name = None
    blocks = find_blocks(model)
    check(model, blocks)
    found = {frozenset(names[n] for n in b.nodes if n.op_type in ("Conv", "Gemm", "MatMul")) for b in blocks}
    assert found == {frozenset(layers) for layers in net.regions}


def test_where_quantizers_belong() -> None:
    """To the convolution behind whose output they are, else to the block that reads them first."""
    model = Net(5, quantized=True).model
    blocks = find_blocks(model)
    place = {node: block for block in blocks for node in block.nodes}
    pairs = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    assert pairs and all(pair in place for pair in pairs)
    for pair in pairs:
        quantize = pair.inputs[0].producer() if pair.inputs[0] is not None else None
        assert quantize is not None and quantize.inputs[0] is not None and place[quantize] is place[pair]
        value = quantize.inputs[0]
        source = value.producer()
        if source is not None and source.op_type == "Conv":
            assert place[pair] is place[source]
        elif value.const_value is not None:
            assert all(place[u.node] is place[pair] for u in pair.outputs[0].uses())
        else:
            readers = [blocks.index(place[u.node]) for u in pair.outputs[0].uses() if u.node in place]
            assert blocks.index(place[pair]) == min(readers)


def test_parameters_and_inputs_of_the_tiny_denoiser() -> None:
    blocks = {block.layers[0]: block for block in find_blocks(tiny_model())}
    first, attention = blocks["b1_conv1"], blocks["q"]
    assert first.layers == ("b1_conv1", "b1_time", "b1_conv2")
    assert first.parameters == 2 * (16 * 16 * 9 + 16) + 32 * 16 + 16
    assert {v.name for v in first.inputs} == {"start", "time"} and [v.name for v in first.activations] == ["start"]
    assert attention.parameters == 4 * 16 * 16 + 2 * 16 and len(attention.layers) == 6
    assert {layer for block in blocks.values() for layer in block.layers} >= {"gate", "down", "up", "conv_out"}


def test_blocks_that_no_order_can_execute_are_taken_apart() -> None:
    """Two modules, each a residual block, of which each reads a layer of the other."""
    lines = [f"[{m}/c1/Conv] {m}1 = Conv {KERNEL} (sample, image)" for m in "ab"]
    lines += ["[a/Mul] am = Mul (a1, b1)", "[b/Mul] bm = Mul (b1, a1)"]
    lines += [f"[{m}/c2/Conv] {m}2 = Conv {KERNEL} ({m}m, image)" for m in "ab"]
    lines += [f"[{m}/Add] {m}x = Add ({m}2, sample)" for m in "ab"]
    model = parsed([*lines, "[sum] epsilon = Add (ax, bx)"])
    blocks = find_blocks(model)
    check(model, blocks)
    assert {b.name for b in blocks} == {"a/c1/Conv", "a/c2/Conv", "b/c1/Conv", "b/c2/Conv"}


def test_an_unknown_sample() -> None:
    with pytest.raises(PassError, match="no input 'x'"):
        find_blocks(tiny_model(), "x")
