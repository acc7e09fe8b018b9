"""A Program's graph as a torch.fx module with gradients: what is trained is the graph that is written.

    graph = to_torch(program.model, signature=program.signature, taps=["conv2d_3"])
    epsilon, tapped = graph.module(x, t)
    print(graph.module.code)

Each node is a call of one function of the table in operations.py. The pairs QuantizeLinear and DequantizeLinear, with
the Clip of a narrow format between them, are one call of a module of quantizers.py; nodes that move the integers
between the two move the quantized values instead.
"""

from __future__ import annotations

import inspect
import keyword
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onnx_ir as ir
import torch
from torch import fx, nn

from mezzotint.runtime.signature import Signature

from ..errors import PassError
from ..graph.nodes import DEFAULT_DOMAINS, is_op, name_of
from .constants import attributes_of, literal_of, parameter_of
from .operations import torch_operation
from .pairs import Pairs
from .trained import weights_of
from .values import TorchFunction

HOST = torch.device("cpu")
VALUE = "onnx_value"
"""The key of a value's name in the `meta` of its fx node."""


@dataclass(frozen=True)
class TorchGraph:
    """A graph as a torch module.

    module      takes the graph's inputs in the order of `inputs`; returns a tuple of the outputs and the taps
    weights     the parameters of layers and normalizations, by the names of their initializers
    quantizers  the module of each QuantizeLinear, by the name of the node
    inputs      name and rank of each input
    outputs     the names of the values that the module returns
    fixed_batch the batch that the graph fixes, or None when it is open
    device      where the module is, and what it is called with
    """

    module: fx.GraphModule
    weights: Mapping[str, nn.Parameter]
    quantizers: Mapping[str, nn.Module]
    inputs: Mapping[str, int]
    outputs: tuple[str, ...]
    fixed_batch: int | None = None
    device: torch.device = HOST

    def to(self, device: torch.device) -> TorchGraph:
        """Move the module to a device, with all that it holds; return the graph there."""
        names = {id(parameter): path for path, parameter in self.module.named_parameters()}
        self.module.to(device)
        moved = {name: self.module.get_parameter(names[id(weight)]) for name, weight in self.weights.items()}
        return replace(self, weights=moved, device=device)

    def per_sample(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs of a batch whose samples have timesteps `[batch]` of their own.

        The graph has one timestep for a call, so each sample is a batch of one. The rows of all timesteps get their
        gradients at once. A condition has a row for each sample, and a tapped value is one of each sample.
        """
        if self.fixed_batch not in (None, 1):
            raise PassError(
                f"the graph has a batch of {self.fixed_batch}, so its samples share one timestep",
                hint="export the model with an open batch, or call the module with one timestep at a time",
            )
        names, given = list(self.inputs), conditions or {}
        if given.keys() != set(names[2:]):
            raise PassError(f"the graph takes the conditions {names[2:]}, not {list(given)}", hint="give each of them")
        rows = [x, t, *(given[name] for name in names[2:])]
        single = [_single(part, rank) for part, rank in zip(rows, self.inputs.values(), strict=True)]
        # QDrop draws other elements for each sample.
        return tuple(_joined(part) for part in torch.func.vmap(self.module, randomness="different")(*single))


def _single(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Return rows `[batch, ...]` as batches of one, `[batch, 1, ...]`, or as numbers where the input is one."""
    return rows.unsqueeze(1) if rank else rows.reshape(-1)


def _joined(results: torch.Tensor) -> torch.Tensor:
    return results.flatten(0, 1) if results.ndim > 1 else results


def to_torch(model: ir.Model, *, taps: Sequence[str] = (), signature: Signature | None = None) -> TorchGraph:
    """Return a graph as a torch module that also returns the values `taps`.

    With the signature of its program the module takes sample, timestep and conditions in this order, else in that of
    the graph. Raises PassError for an operation that the table lacks, with the node.
    """
    return _Converter(model.graph, signature).convert(taps)


class _Converter:
    """The state of one conversion: the fx graph, the value of each ONNX value in it, and what the module holds."""

    def __init__(self, graph: ir.Graph, signature: Signature | None) -> None:
        self.graph, self.signature = graph, signature
        self.fx = fx.Graph()
        self.held: dict[str, Any] = {}
        self.values: dict[ir.Value, Any] = {}
        self.weights: dict[str, nn.Parameter] = {}
        self.quantizers: dict[str, nn.Module] = {}
        self.trained = set(weights_of(graph))
        self.pairs = Pairs()

    def convert(self, taps: Sequence[str]) -> TorchGraph:
        for value in (inputs := self._inputs()):
            self.values[value] = self.fx.placeholder(_identifier(name_of(value)))
        for node in self.graph:
            self._convert(node)
        returned = [*self.graph.outputs, *self._tapped(taps)]
        self.fx.output(tuple(self._read(value) for value in returned))
        self.fx.eliminate_dead_code(lambda made: made.op in ("placeholder", "output"))
        self.fx.lint()
        module = fx.GraphModule(self.held, self.fx, "Denoiser")
        held = {id(part) for part in (*module.parameters(), *module.modules())}
        return TorchGraph(
            module,
            {name: weight for name, weight in self.weights.items() if id(weight) in held},
            {name: quantizer for name, quantizer in self.quantizers.items() if id(quantizer) in held},
            {name_of(value): 0 if value.shape is None else len(value.shape) for value in inputs},
            tuple(name_of(value) for value in returned),
            _fixed_batch(inputs),
        )

    def _inputs(self) -> list[ir.Value]:
        inputs = list(self.graph.inputs)
        if self.signature is None:
            return inputs
        order = [self.signature.sample, self.signature.timestep, *self.signature.conditions]
        return sorted(inputs, key=lambda value: order.index(name_of(value)))

    def _tapped(self, taps: Sequence[str]) -> list[ir.Value]:
        known = {name_of(out): out for node in self.graph for out in node.outputs}
        for name in taps:
            if name not in known:
                raise PassError(f"no node computes the value {name!r}", hint="tap an output of a node")
            if known[name] in self.pairs:
                raise PassError(
                    f"the value {name!r} holds integers, which the torch module does not compute",
                    hint="tap the output of its DequantizeLinear",
                )
        return [known[name] for name in taps]

    def _convert(self, node: ir.Node) -> None:
        if is_op(node, "Constant"):
            return  # read where it is used
        if is_op(node, "QuantizeLinear"):
            self._quantize(node)
        elif self.pairs.passes(node):
            self.values[node.outputs[0]] = self._read(node.inputs[0])
        else:
            self._call(node)

    def _quantize(self, node: ir.Node) -> None:
        quantizer, row = self.pairs.open(node)
        held = next((key for key, part in self.held.items() if part is quantizer), None)
        key = held or self._hold(name_of(node.outputs[0]), quantizer)
        self.quantizers[node.name or key] = quantizer
        given = {} if row is None else {"row": self._read(row)}
        name = _identifier(name_of(node.outputs[0]))
        made = self.fx.create_node("call_module", key, (self._read(node.inputs[0]),), given, name=name)
        self._set(node.outputs[0], made)

    def _call(self, node: ir.Node) -> None:
        function = torch_operation(node.domain, node.op_type)
        if function is None:
            kind = node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}.{node.op_type}"
            raise PassError(
                f"the operation {kind} has no function in torch, so the graph cannot be trained",
                where=f"{kind} {node.name!r}",
                hint="leave out the pass that trains, or add the operation to compiler/torch_graph/operations.py",
            )
        self.pairs.move(node)
        given = _without_defaults(function, attributes_of(node))
        arguments = tuple(self._argument(node, i) for i in range(len(node.inputs)))
        _check_call(function, node, arguments, given)
        key = _identifier(name_of(node.outputs[0]))
        several = node.op_type == "Split"
        name = f"{key}_parts" if several else key
        made = self.fx.create_node("call_function", function, arguments, given, name=name)
        if not several:
            self._set(node.outputs[0], made)
        for i, out in enumerate(node.outputs if several else ()):
            part = self.fx.create_node("call_function", operator.getitem, (made, i), name=_identifier(name_of(out)))
            self._set(out, part)

    def _set(self, value: ir.Value, made: fx.Node) -> None:
        made.meta[VALUE] = name_of(value)
        self.values[value] = made

    def _argument(self, node: ir.Node, index: int) -> Any:
        value = node.inputs[index]
        return None if value is None else self._read(value)

    def _read(self, value: ir.Value | None) -> Any:
        """Return the fx node of a value, or the constant to write into the code."""
        if value is None:
            return None
        if value in self.values:
            return self.values[value]
        literal = None if value in self.trained else literal_of(value)
        if literal is not None:
            return literal
        name = name_of(value)
        tensor = parameter_of(value)
        if value in self.trained:
            self.weights[name] = nn.Parameter(tensor)
        key = self._hold(name, self.weights.get(name, tensor))
        made = self.fx.create_node("get_attr", key, name=key)
        self.values[value] = made
        return made

    def _hold(self, preferred: str, part: Any) -> str:
        """Keep a parameter, a buffer or a module under a name of its own, and return the name."""
        name, k = _identifier(preferred), 1
        while name in self.held or hasattr(fx.GraphModule, name):
            name, k = f"{_identifier(preferred)}_{k}", k + 1
        self.held[name] = part
        return name


def _identifier(name: str) -> str:
    """Return a value's name as one of Python."""
    cleaned = re.sub(r"\W", "_", name)
    return f"_{cleaned}" if not cleaned or cleaned[0].isdigit() or keyword.iskeyword(cleaned) else cleaned


def _check_call(function: TorchFunction, node: ir.Node, arguments: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Raise PassError where the function of a node does not take its inputs or its attributes."""
    where = f"{node.op_type} {node.name!r}"
    try:
        inspect.signature(function).bind(*arguments, **given)
    except TypeError as error:
        raise PassError(f"the torch function of the operation does not fit: {error}", where=where) from error
    for name, kind in get_type_hints(function).items():
        if get_origin(kind) is Literal and name in given and given[name] not in get_args(kind):
            raise PassError(
                f"the torch function of the operation knows no {name} {given[name]!r}",
                where=where,
                hint=f"it knows {', '.join(map(repr, get_args(kind)))}",
            )
    unread = [out for out in node.outputs[1:] if node.op_type != "Split" and (out.uses() or out.is_graph_output())]
    if unread:
        raise PassError(f"the torch function computes no second output, which is {name_of(unread[0])!r}", where=where)


def _without_defaults(function: TorchFunction, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that the code has to show."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name not in known or known[name].default != value}


def _fixed_batch(inputs: Sequence[ir.Value]) -> int | None:
    """Return the first size of the first input, the sample, where it is a number."""
    shape = inputs[0].shape if inputs else None
    size = shape[0] if shape else None
    return size if isinstance(size, int) else None
