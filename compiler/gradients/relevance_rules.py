"""Rules of layer-wise relevance propagation, as changes of the gradient of single operations.

Where a network consists of linear layers without biases and of operations with f(x) = f'(x) x, the product y dR/dy of
each value y and the gradient of R = 1/2 |f|^2 is its relevance (LRP-0, Bach et al. 2015), and sums to |f|^2 over any
cut through the network. The other operations keep that by a gradient of their own, with unchanged values:

    gates of themselves    x sigmoid(x), GELU, ...: the gate is held, so x gets all relevance
    normalizations         the deviation is held (AttnLRP, arXiv 2402.05602; LN-rule of Ali et al., arXiv 2202.07304)
    products of two values each gets half (AttnLRP, eq. 14), in attention as well; a softmax has its own gradient
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..torch_graph.quantizers import with_gradient_of
from ..torch_graph.values import TorchFunction

_NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization")
_SELF_GATED = ("Swish", "HardSwish", "Gelu", "Mish", "Elu", "Softplus")
_HELD = ("Erf", "Tanh", "Sqrt")
"""Gates inside of a GELU that is written out, and the deviation of a normalization that is."""
SMALLEST_INPUT = 1e-12


def apply_rules(module: fx.GraphModule) -> None:
    """Give the operations of a module the gradients of the rules. Its second input is the timestep, which has none."""
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    constant = set(given[1:2])  # what depends on the timestep, on constants and on held values alone
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            constant |= {node} if node.op == "get_attr" else set()
            continue
        name = getattr(node.target, "__name__", "")
        moving = [part for part in node.all_input_nodes if part not in constant]
        if name in _HELD or not moving:
            constant.add(node)
        rule = _rule_of(node, name, moving)
        if rule is not None:
            node.target = rule(node.target)
    module.recompile()


def _rule_of(node: fx.Node, name: str, moving: list[fx.Node]) -> Callable[[TorchFunction], TorchFunction] | None:
    if name in _HELD:
        return held
    if name in _SELF_GATED:
        return gated
    if name in _NORMALIZATIONS:
        return normalized
    if name not in ("Mul", "MatMul") or len(moving) < 2:
        return None
    if name == "Mul" and _gates(moving[1], moving[0]):
        return second_held if node.args[0] is moving[0] else first_held
    if name == "Mul" and _gates(moving[0], moving[1]):
        return first_held if node.args[0] is moving[0] else second_held
    return halved


def _gates(gate: fx.Node, value: fx.Node) -> bool:
    """Return whether a value is the sigmoid of another one, or of it times a number, and nothing else."""
    if getattr(gate.target, "__name__", "") not in ("Sigmoid", "HardSigmoid"):
        return False
    source = gate.args[0]
    if isinstance(source, fx.Node) and getattr(source.target, "__name__", "") == "Mul":
        inner = [part for part in source.args if isinstance(part, fx.Node) and part.op == "call_function"]
        source = inner[0] if len(inner) == 1 else source
    return source is value


def _named(function: TorchFunction, rule: TorchFunction, kind: str) -> TorchFunction:
    """Name a rule so that the module's code can call it beside the operation itself."""
    rule.__name__ = rule.__qualname__ = f"{function.__name__}_{kind}"
    rule.__module__ = "relevance"
    return rule


def held(function: TorchFunction) -> TorchFunction:
    """The output is a constant."""

    def rule(*args: Any, **given: Any) -> torch.Tensor:
        return function(*args, **given).detach()  # type: ignore[no-any-return]

    return _named(function, rule, "held")


def gated(function: TorchFunction) -> TorchFunction:
    """f(x) = x g: g is held."""

    def rule(x: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        with torch.no_grad():
            value = function(x, *args, **given)
            gate = torch.where(x.abs() > SMALLEST_INPUT, value / torch.where(x.abs() > SMALLEST_INPUT, x, 1.0), 0.0)
        return with_gradient_of(value, x * gate)

    return _named(function, rule, "gated")


def normalized(function: TorchFunction) -> TorchFunction:
    """The deviation is held, so the normalization is linear."""

    def rule(x: torch.Tensor, scale: torch.Tensor, bias: Any = None, **given: Any) -> torch.Tensor:
        with torch.no_grad():
            value = function(x, scale, *(() if bias is None else (bias,)), **given)
        centred, deviation = _centred(function.__name__, x, **given)
        weight = _per_channel(function.__name__, x, scale)
        return with_gradient_of(value, centred / deviation.detach() * weight)

    return _named(function, rule, "normalized")


def _centred(
    name: str, x: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, num_groups: int = 0, stash_type: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x less its mean, and its deviation, as a normalization sees them."""
    if name in ("LayerNormalization", "RMSNormalization"):
        axes = tuple(range(axis % x.ndim, x.ndim))
        centred = x if name == "RMSNormalization" else x - x.mean(axes, keepdim=True)
        return centred, (centred.square().mean(axes, keepdim=True) + epsilon).sqrt()
    groups = num_groups or x.shape[1]
    parts = x.reshape(x.shape[0], groups, -1)
    centred = parts - parts.mean(2, keepdim=True)
    deviation = (centred.square().mean(2, keepdim=True) + epsilon).sqrt().expand_as(parts)
    return centred.reshape(x.shape), deviation.reshape(x.shape)


def _per_channel(name: str, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the scale of a normalization in a shape that broadcasts: per group, it is repeated."""
    if name in ("LayerNormalization", "RMSNormalization"):
        return scale
    wide = scale if len(scale) == x.shape[1] else scale.repeat_interleave(x.shape[1] // len(scale))
    return wide.reshape(1, -1, *(1,) * (x.ndim - 2))


def halved(function: TorchFunction) -> TorchFunction:
    """Both factors of a product get half."""

    def rule(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        value = function(a, b)
        return with_gradient_of(value, value / 2)

    return _named(function, rule, "halved")


def first_held(function: TorchFunction) -> TorchFunction:
    """The first factor is a gate of the second."""
    return _named(function, lambda a, b: function(a.detach(), b), "first_held")


def second_held(function: TorchFunction) -> TorchFunction:
    """The second factor is a gate of the first."""
    return _named(function, lambda a, b: function(a, b.detach()), "second_held")
