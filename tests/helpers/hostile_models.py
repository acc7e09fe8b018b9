"""Damaged and hostile ONNX files, by kind. Each kind is a function of a valid model and a random generator.

A kind returns the bytes of the file. Kinds of external data also write files next to it, into `folder`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

Kind = Callable[[onnx.ModelProto, random.Random], bytes]
ExternalKind = Callable[[onnx.ModelProto, random.Random, Path], None]
KINDS: dict[str, Kind] = {}
EXTERNAL: dict[str, ExternalKind] = {}
HUGE = (1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1)


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def external(function: ExternalKind) -> ExternalKind:
    EXTERNAL[function.__name__] = function
    return function


def damaged(name: str, model: onnx.ModelProto, seed: int) -> bytes:
    """Return the bytes of a copy of `model` with one damage of a kind."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return KINDS[name](copy, random.Random(f"{name} {seed}"))


def damaged_external(name: str, model: onnx.ModelProto, seed: int, folder: Path) -> Path:
    """Write a copy of `model` whose weights are in files of `folder`, with one damage of a kind; return its path."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    EXTERNAL[name](copy, random.Random(f"{name} {seed}"), folder)
    path = folder / "model.onnx"
    if not os.path.lexists(path):
        path.write_bytes(copy.SerializeToString())
    return path


def _weight(model: onnx.ModelProto, rng: random.Random) -> TensorProto:
    tensor: TensorProto = rng.choice(list(model.graph.initializer))
    return tensor


def _node(model: onnx.ModelProto, rng: random.Random, op: str = "") -> onnx.NodeProto:
    node: onnx.NodeProto = rng.choice([n for n in model.graph.node if not op or n.op_type == op])
    return node


# -- bytes ------------------------------------------------------------------------------------------------------------


@kind
def flipped_bits(model: onnx.ModelProto, rng: random.Random) -> bytes:
    data = bytearray(model.SerializeToString())
    for _ in range(rng.choice((1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@kind
def flipped_structure(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """Flips outside the weights: names, types, dimensions, lengths."""
    data = bytearray(model.SerializeToString())
    raws = [t.raw_data for t in model.graph.initializer if len(t.raw_data) > 64]
    covered = [(at, at + len(raw)) for raw in raws if (at := bytes(data).find(raw)) >= 0]
    places = [i for i in range(len(data)) if not any(low <= i < high for low, high in covered)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        data[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(data)


@kind
def truncated(model: onnx.ModelProto, rng: random.Random) -> bytes:
    data = model.SerializeToString()
    return bytes(data[: rng.choice((0, 1, 7, rng.randrange(len(data)), len(data) - 1))])


@kind
def garbage(model: onnx.ModelProto, rng: random.Random) -> bytes:
    data = model.SerializeToString()
    return rng.choice(
        (
            rng.randbytes(rng.randrange(1, 5000)),
            b"\x00" * rng.randrange(1, 5000),
            b'{"not": "a model"}',
            b"ein Text, kein Modell \x1b[31m\n" * 5,
            b"PK\x03\x04" + rng.randbytes(200),
            data + rng.randbytes(50),
            data[len(data) // 2 :] + data[: len(data) // 2],
            data + data,
        )
    )


# -- tensors ----------------------------------------------------------------------------------------------------------


@kind
def wrong_raw_size(model: onnx.ModelProto, rng: random.Random) -> bytes:
    tensor = _weight(model, rng)
    raw = tensor.raw_data or b"\x00" * 64
    tensor.raw_data = rng.choice((raw[:-1], raw + b"\x00", raw[: len(raw) // 2], b"\x01", raw * 2))
    return bytes(model.SerializeToString())


@kind
def wrong_dims(model: onnx.ModelProto, rng: random.Random) -> bytes:
    tensor = _weight(model, rng)
    change = rng.choice(("huge", "negative", "longer", "empty", "zero", "many"))
    dims = list(tensor.dims) or [1]
    i = rng.randrange(len(dims))
    if change == "huge":
        dims[i] = rng.choice(HUGE)
    elif change == "negative":
        dims[i] = -rng.choice((1, 3, 1 << 40))
    elif change == "longer":
        dims[i] += 1
    elif change == "empty":
        dims = []
    elif change == "zero":
        dims[i] = 0
    else:
        dims = [1] * 5000 + dims
    del tensor.dims[:]
    tensor.dims.extend(dims)
    return bytes(model.SerializeToString())


@kind
def wrong_data_type(model: onnx.ModelProto, rng: random.Random) -> bytes:
    tensor = _weight(model, rng)
    tensor.data_type = rng.choice((0, 2, 3, 8, 9, 10, 11, 14, 16, 17, 22, 23, 99, -1, 2**31 - 1))
    return bytes(model.SerializeToString())


@kind
def typed_field(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """Values in a field of another type, or in two fields."""
    tensor = _weight(model, rng)
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    getattr(tensor, rng.choice(("float_data", "int32_data", "int64_data", "double_data", "uint64_data"))).extend(
        [1] * rng.choice((1, 7, 5000))
    )
    return bytes(model.SerializeToString())


@kind
def string_tensor(model: onnx.ModelProto, rng: random.Random) -> bytes:
    tensor = _weight(model, rng)
    size = 1
    for dim in tensor.dims:
        size *= dim
    tensor.ClearField("raw_data")
    tensor.data_type = TensorProto.STRING
    tensor.string_data.extend([b"x\xff\x00"] * rng.choice((size, 1)))
    return bytes(model.SerializeToString())


@kind
def sparse_weight(model: onnx.ModelProto, rng: random.Random) -> bytes:
    tensor = _weight(model, rng)
    sparse = model.graph.sparse_initializer.add()
    sparse.dims.extend(list(tensor.dims) or [1])
    sparse.values.name = tensor.name
    sparse.values.data_type = TensorProto.FLOAT
    sparse.values.dims.append(1)
    sparse.values.float_data.append(1.0)
    sparse.indices.data_type = TensorProto.INT64
    sparse.indices.dims.append(1)
    sparse.indices.int64_data.append(rng.choice((0, -1, 1 << 40)))
    model.graph.initializer.remove(tensor)
    return bytes(model.SerializeToString())


@kind
def weights_not_finite(model: onnx.ModelProto, rng: random.Random) -> bytes:
    import numpy as np

    tensor = rng.choice([t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.raw_data])
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    values[rng.randrange(len(values))] = rng.choice((np.nan, np.inf, -np.inf))
    tensor.raw_data = values.tobytes()
    return bytes(model.SerializeToString())


# -- graph ------------------------------------------------------------------------------------------------------------


@kind
def cycle(model: onnx.ModelProto, rng: random.Random) -> bytes:
    nodes = list(model.graph.node)
    late = rng.randrange(1, len(nodes))
    early = rng.randrange(late + 1) if rng.random() < 0.8 else late
    nodes[early].input[0] = nodes[late].output[0]
    return bytes(model.SerializeToString())


@kind
def missing_value(model: onnx.ModelProto, rng: random.Random) -> bytes:
    node = _node(model, rng)
    i = rng.randrange(len(node.input))
    node.input[i] = rng.choice(("nothing", "", "\u202egnihton", "x" * 100_000))
    return bytes(model.SerializeToString())


@kind
def missing_part(model: onnx.ModelProto, rng: random.Random) -> bytes:
    part = rng.choice(("node", "input", "output", "initializer"))
    items = getattr(model.graph, part)
    del items[rng.randrange(len(items))]
    return bytes(model.SerializeToString())


@kind
def empty_part(model: onnx.ModelProto, rng: random.Random) -> bytes:
    part = rng.choice(("node", "input", "output", "initializer", "graph", "opset_import", "all"))
    if part == "graph":
        model.ClearField("graph")
    elif part == "all":
        return bytes(onnx.ModelProto().SerializeToString())
    elif part == "opset_import":
        del model.opset_import[:]
    else:
        del getattr(model.graph, part)[:]
    return bytes(model.SerializeToString())


@kind
def duplicates(model: onnx.ModelProto, rng: random.Random) -> bytes:
    part = rng.choice(("node", "input", "output", "initializer", "names", "inputs and outputs"))
    if part == "names":
        for node in model.graph.node:
            node.output[0] = "same"
    elif part == "inputs and outputs":
        model.graph.output[0].name = model.graph.input[0].name
    else:
        items = getattr(model.graph, part)
        items.append(rng.choice(list(items)))
    return bytes(model.SerializeToString())


@kind
def unsorted(model: onnx.ModelProto, rng: random.Random) -> bytes:
    nodes = list(model.graph.node)
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


@kind
def versions(model: onnx.ModelProto, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        model.ir_version = rng.choice((0, 1, 2, 99, 1 << 31, (1 << 63) - 1, -1))
    else:
        model.opset_import[0].version = rng.choice((0, -1, 1, 7, 12, 60, 999, (1 << 63) - 1, -(1 << 63)))
    return bytes(model.SerializeToString())


@kind
def domains(model: onnx.ModelProto, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        model.opset_import[0].domain = rng.choice(("nowhere", "com.microsoft", "\x1b[31mred", "x" * 10_000))
    else:
        _node(model, rng).domain = rng.choice(("nowhere", "com.microsoft", "ai.onnx.ml", "../../x", "\x07"))
    return bytes(model.SerializeToString())


@kind
def operations(model: onnx.ModelProto, rng: random.Random) -> bytes:
    odd = ["SequenceEmpty", "NonZero", "QuantizeLinear", "GroupNormalization", "x" * 50_000, "\x1b]0;t\x07", ""]
    known = ["Loop", "If", "Scan", "Relu", "Gather", "Resize", "RandomNormal", "Optional", "Constant", "Nothing"]
    _node(model, rng).op_type = rng.choice([*odd, *known])
    return bytes(model.SerializeToString())


@kind
def names(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """Names with control characters, markup, separators, and great length; readers follow."""
    new = rng.choice(("\x1b[31mred", "[bold]x[/]", "a\nerror: forged", "../../x", "x" * 70_000, "\u202e", "'\"`", " "))
    old = rng.choice([node.output[0] for node in model.graph.node] + [value.name for value in model.graph.input])
    for node in model.graph.node:
        if rng.random() < 0.2:
            node.name = new
        for field in (node.input, node.output):
            field[:] = [new if name == old else name for name in field]
    for value in [*model.graph.input, *model.graph.output]:
        value.name = new if value.name == old else value.name
    return bytes(model.SerializeToString())


@kind
def attributes(model: onnx.ModelProto, rng: random.Random) -> bytes:
    node = _node(model, rng, "Conv")
    change = rng.choice(("group", "kernel", "pads", "strides", "type", "twice", "dilations", "unknown"))
    if change == "type":
        node.attribute[0].type = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 99))
    elif change == "twice":
        node.attribute.append(node.attribute[0])
    elif change == "unknown":
        node.attribute.append(helper.make_attribute("unknown", 1))
    else:
        name = {"kernel": "kernel_shape"}.get(change, change)
        value: object = {
            "group": rng.choice((0, -1, 3, 1 << 40)),
            "kernel": [rng.choice((0, -1, 1, 1 << 40)), 3],
            "pads": rng.choice(([1 << 40] * 4, [-5] * 4, [1], [1] * 99)),
            "strides": rng.choice(([0, 0], [-1, 1], [1 << 40, 1])),
            "dilations": rng.choice(([0, 0], [-1, 1], [1 << 40, 1])),
        }[change]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return bytes(model.SerializeToString())


@kind
def input_types(model: onnx.ModelProto, rng: random.Random) -> bytes:
    value = rng.choice([*model.graph.input, *model.graph.output])
    change = rng.choice(("element", "no type", "dims", "rank", "no shape", "sequence", "huge", "negative"))
    tensor = value.type.tensor_type
    if change == "element":
        tensor.elem_type = rng.choice((0, 2, 3, 7, 8, 9, 10, 11, 14, 16, 17, 22, 99, -1))
    elif change == "no type":
        value.ClearField("type")
    elif change == "no shape":
        tensor.ClearField("shape")
    elif change == "sequence":
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif change == "rank":
        tensor.shape.dim.add().dim_value = 2
    elif tensor.shape.dim:
        dim = rng.choice(list(tensor.shape.dim))
        dim.dim_value = {"dims": 7, "huge": rng.choice(HUGE), "negative": -3}[change]
    return bytes(model.SerializeToString())


@kind
def wrong_value_info(model: onnx.ModelProto, rng: random.Random) -> bytes:
    name = _node(model, rng).output[0]
    shape = rng.choice(([1], [3, 5, 7], [1 << 40], [-1, -1], [0] * 3000))
    model.graph.value_info.append(helper.make_tensor_value_info(name, rng.choice((1, 7, 8, 10, 99)), shape))
    return bytes(model.SerializeToString())


# -- bombs ------------------------------------------------------------------------------------------------------------


def _with_constant(model: onnx.ModelProto, nodes: list[onnx.NodeProto], result: str, **integers: list[int]) -> bytes:
    """Return the model with nodes in front, whose result (a float) is multiplied into the sample."""
    for name, values in integers.items():
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    reads = next(node for node in model.graph.node if model.graph.input[0].name in node.input)
    sample = model.graph.input[0].name
    nodes = [
        *nodes,
        helper.make_node("ReduceMax", [result], ["bomb_max"], keepdims=0),
        helper.make_node("Mul", [sample, "bomb_max"], ["bomb_sample"]),
    ]
    reads.input[:] = ["bomb_sample" if name == sample else name for name in reads.input]
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *kept])
    return bytes(model.SerializeToString())


@kind
def constant_bomb(model: onnx.ModelProto, rng: random.Random) -> bytes:
    size = rng.choice((1 << 32, 1 << 40, 1 << 62))
    how = rng.choice(("fill", "expand", "tile", "range", "pad", "many dims"))
    one = helper.make_node("ConstantOfShape", ["small"], ["ones"], value=helper.make_tensor("", 1, [1], [1.0]))
    if how == "range":
        nodes = [
            helper.make_node("Constant", [], ["r0"], value_int=0),
            helper.make_node("Constant", [], ["r1"], value_int=size),
            helper.make_node("Constant", [], ["r2"], value_int=1),
            helper.make_node("Range", ["r0", "r1", "r2"], ["whole"]),
            helper.make_node("Cast", ["whole"], ["bomb"], to=1),
        ]
        return _with_constant(model, nodes, "bomb")
    nodes = {
        "fill": [
            helper.make_node("ConstantOfShape", ["big"], ["bomb"], value=helper.make_tensor("", 1, [1], [1.0])),
        ],
        "expand": [one, helper.make_node("Expand", ["ones", "big"], ["bomb"])],
        "tile": [one, helper.make_node("Tile", ["ones", "big"], ["bomb"])],
        "pad": [one, helper.make_node("Pad", ["ones", "pads"], ["bomb"])],
        "many dims": [
            helper.make_node("ConstantOfShape", ["dims"], ["bomb"], value=helper.make_tensor("", 1, [1], [1.0])),
        ],
    }[how]
    return _with_constant(model, nodes, "bomb", small=[1], big=[size], pads=[0, size], dims=[256] * 5)


def _loop(turns: str, body: list[onnx.NodeProto], name: str, depth: int) -> onnx.NodeProto:
    graph = helper.make_graph(
        body or [helper.make_node("Identity", [f"state_in_{depth}"], [f"state_out_{depth}"])],
        f"body_{depth}",
        [
            helper.make_tensor_value_info(f"turn_{depth}", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"go_{depth}", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"state_in_{depth}", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info(f"go_{depth}", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"state_out_{depth}", TensorProto.FLOAT, []),
        ],
    )
    return helper.make_node("Loop", [turns, "", name], [f"loop_{depth}"], body=graph)


@kind
def loop_bomb(model: onnx.ModelProto, rng: random.Random) -> bytes:
    how = rng.choice(("many turns", "no end", "nested", "computed"))
    turns = {"many turns": rng.choice((10**9, 10**15, (1 << 63) - 1)), "nested": 10_000}.get(how, 10**12)
    start = helper.make_node("Constant", [], ["state"], value_float=1.0)
    count = helper.make_node("Constant", [], ["turns"], value_int=turns)
    if how == "no end":
        node = _loop("", [], "state", 0)
        node.input[1] = "true"
        model.graph.initializer.append(helper.make_tensor("true", TensorProto.BOOL, [], [True]))
        return _with_constant(model, [start, node], "loop_0")
    if how == "computed":
        twice = helper.make_node("Add", ["turns", "turns"], ["more_turns"])
        return _with_constant(model, [start, count, twice, _loop("more_turns", [], "state", 0)], "loop_0")
    body: list[onnx.NodeProto] = []
    if how == "nested":
        for depth in (4, 3, 2, 1):
            inner = _loop("turns", body, f"state_in_{depth - 1}", depth)
            body = [inner, helper.make_node("Identity", [f"loop_{depth}"], [f"state_out_{depth - 1}"])]
    return _with_constant(model, [start, count, _loop("turns", body, "state", 0)], "loop_0")


@kind
def deep_subgraphs(model: onnx.ModelProto, rng: random.Random) -> bytes:
    body = [helper.make_node("Constant", [], ["r"], value_float=1.0)]
    for depth in range(rng.choice((5, 20, 45, 60))):
        out = [helper.make_tensor_value_info("r" if depth == 0 else f"r{depth}", TensorProto.FLOAT, [])]
        graph = helper.make_graph(body, f"g{depth}", [], out)
        body = [helper.make_node("If", ["true"], [f"r{depth + 1}"], then_branch=graph, else_branch=graph)]
        if len(graph.SerializeToString()) > 200_000:  # both branches: it doubles with each level
            body = [helper.make_node("If", ["true"], [f"r{depth + 1}"], then_branch=graph)]
            break
    model.graph.initializer.append(helper.make_tensor("true", TensorProto.BOOL, [], [True]))
    return _with_constant(model, body, body[-1].output[0])


@kind
def function_bomb(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """Local functions that call themselves, each other, or double with each of many levels."""
    how = rng.choice(("itself", "each other", "doubling", "missing", "wrong opset", "duplicate"))
    model.opset_import.append(helper.make_opsetid("local", 1))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]

    def function(name: str, calls: list[str]) -> onnx.FunctionProto:
        values = ["a", *(f"v{i}" for i in range(len(calls)))]
        nodes = [
            helper.make_node(call, [values[i]], [values[i + 1]], domain="" if call == "Identity" else "local")
            for i, call in enumerate(calls)
        ]
        return helper.make_function("local", name, ["a"], [values[-1]], nodes, opsets)

    functions = {
        "itself": [function("F0", ["F0"])],
        "each other": [function("F0", ["F1"]), function("F1", ["F0"])],
        "doubling": [
            *(function(f"F{i}", [f"F{i + 1}"] * 4) for i in range(30)),
            function("F30", ["Identity"]),
        ],
        "missing": [function("F0", ["F77"])],
        "wrong opset": [function("F0", ["Identity"])],
        "duplicate": [function("F0", ["Identity"]), function("F0", ["Identity"])],
    }[how]
    if how == "wrong opset":
        functions[0].opset_import[0].version = 999
    model.functions.extend(functions)
    start = helper.make_node("Constant", [], ["start"], value_float=1.0)
    return _with_constant(model, [start, helper.make_node("F0", ["start"], ["called"], domain="local")], "called")


@kind
def many_nodes(model: onnx.ModelProto, rng: random.Random) -> bytes:
    count = rng.choice((60_000, 250_000))
    start = helper.make_node("Constant", [], ["n0"], value_float=1.0)
    chain = [helper.make_node("Neg", [f"n{i}"], [f"n{i + 1}"]) for i in range(count)]
    return _with_constant(model, [start, *chain], f"n{count}")


# -- external data ----------------------------------------------------------------------------------------------------


def _moved(model: onnx.ModelProto, folder: Path, location: str = "weights.bin") -> TensorProto:
    """Move the largest weight into a file, and return it."""
    tensor: TensorProto = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    _set(tensor, location=location, offset="0", length=str(length))
    return tensor


def _set(tensor: TensorProto, **fields: str) -> None:
    kept = {entry.key: entry.value for entry in tensor.external_data}
    del tensor.external_data[:]
    for key, value in {**kept, **fields}.items():
        tensor.external_data.add(key=key, value=value)


@external
def outside(model: onnx.ModelProto, rng: random.Random, folder: Path) -> None:
    """The data is in a file that is not of the model's folder."""
    tensor = _moved(model, folder)
    secret = folder.parent / "secret.bin"
    if not secret.exists():
        secret.write_bytes(b"\x00" * 100_000)
    how = rng.choice(("../secret.bin", str(secret), "/etc/passwd", "link", "a/../../secret.bin", "folder link"))
    if how == "link":
        (folder / "linked.bin").symlink_to(secret)
        how = "linked.bin"
    if how == "folder link":
        (folder / "up").symlink_to(folder.parent, target_is_directory=True)
        how = "up/secret.bin"
    _set(tensor, location=how)


@external
def wrong_file(model: onnx.ModelProto, rng: random.Random, folder: Path) -> None:
    tensor = _moved(model, folder)
    how = rng.choice(("missing.bin", "", ".", "pipe", "folder", "/dev/zero", "a" * 5000, "nul\x00byte", "itself"))
    if how == "pipe":
        os.mkfifo(folder / "pipe")
    if how == "folder":
        (folder / "folder").mkdir()
    if how == "itself":
        how = "model.onnx"
    _set(tensor, location=how)


@external
def wrong_range(model: onnx.ModelProto, rng: random.Random, folder: Path) -> None:
    tensor = _moved(model, folder)
    field = rng.choice(("offset", "length"))
    values = ["-1", "1", "3", "999999999999", "9" * 5000, "x", "", "1e3", "0x10", str(1 << 63), str(1 << 64), "NaN"]
    _set(tensor, **{field: rng.choice(values)})


@external
def short_file(model: onnx.ModelProto, rng: random.Random, folder: Path) -> None:
    _moved(model, folder)
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[: rng.choice((0, 1, len(data) - 1, len(data) // 2))])


@external
def wrong_fields(model: onnx.ModelProto, rng: random.Random, folder: Path) -> None:
    tensor = _moved(model, folder)
    how = rng.choice(("no location", "twice", "both", "unknown key", "dims", "location type", "string"))
    if how == "no location":
        del tensor.external_data[:]
    elif how == "twice":
        tensor.external_data.add(key="location", value="other.bin")
    elif how == "both":
        tensor.raw_data = b"\x00" * 8
    elif how == "unknown key":
        tensor.external_data.add(key="sha", value="x" * 100_000)
    elif how == "dims":
        tensor.dims[0] = rng.choice(HUGE)
    elif how == "location type":
        tensor.data_location = 7  # type: ignore[assignment]  # no such value
    else:
        tensor.data_type = TensorProto.STRING


@external
def not_a_file(model: onnx.ModelProto, rng: random.Random, folder: Path) -> None:
    """The model itself is a pipe, a folder, a link to a device, or a link to itself."""
    path = folder / "model.onnx"
    how = rng.choice(("pipe", "folder", "device", "loop", "dangling", "socket"))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "loop":
        path.symlink_to(path)
    elif how == "dangling":
        path.symlink_to(folder / "gone.onnx")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(folder)  # the path of a socket has 108 bytes at most
            try:
                server.bind("model.onnx")
            finally:
                os.chdir(here)
