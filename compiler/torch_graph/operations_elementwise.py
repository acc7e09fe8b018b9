"""Operations on each element, as functions over torch. Each has the name of its ONNX operation."""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch.nn import functional

from .dtypes import torch_dtype
from .quantizers import with_gradient_of
from .values import Operand, TorchFunction, tensor, together


def Add(a: Operand, b: Operand) -> torch.Tensor:
    return torch.add(*together(a, b))


def Sub(a: Operand, b: Operand) -> torch.Tensor:
    return torch.sub(*together(a, b))


def Mul(a: Operand, b: Operand) -> torch.Tensor:
    return torch.mul(*together(a, b))


def Div(a: Operand, b: Operand) -> torch.Tensor:
    """Integers are divided towards zero."""
    x, y = together(a, b)
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def Mod(a: Operand, b: Operand, *, fmod: int = 0) -> torch.Tensor:
    return (torch.fmod if fmod else torch.remainder)(*together(a, b))


def Pow(a: Operand, b: Operand) -> torch.Tensor:
    """The result has the type of the base."""
    x, y = together(a, b)
    return torch.pow(x, y).to(x.dtype)


def Sum(*terms: Operand) -> torch.Tensor:
    return tensor(reduce(Add, terms))


def Max(*terms: Operand) -> torch.Tensor:
    return tensor(reduce(lambda a, b: torch.maximum(*together(a, b)), terms))


def Min(*terms: Operand) -> torch.Tensor:
    return tensor(reduce(lambda a, b: torch.minimum(*together(a, b)), terms))


def Clip(
    x: Operand,
    low: Operand | None = None,
    high: Operand | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
) -> torch.Tensor:
    """`min` and `max` are the limits before opset 11."""
    given = tensor(x)
    low, high = min if low is None else low, max if high is None else high
    given = given if low is None else torch.maximum(given, tensor(low, given).to(given.dtype))
    return given if high is None else torch.minimum(given, tensor(high, given).to(given.dtype))


def Where(condition: Operand, a: Operand, b: Operand) -> torch.Tensor:
    x, y = together(a, b)
    chosen, x = together(condition, x)
    return torch.where(chosen, x, tensor(y, x))


def Equal(a: Operand, b: Operand) -> torch.Tensor:
    return torch.eq(*together(a, b))


def Greater(a: Operand, b: Operand) -> torch.Tensor:
    return torch.gt(*together(a, b))


def GreaterOrEqual(a: Operand, b: Operand) -> torch.Tensor:
    return torch.ge(*together(a, b))


def Less(a: Operand, b: Operand) -> torch.Tensor:
    return torch.lt(*together(a, b))


def LessOrEqual(a: Operand, b: Operand) -> torch.Tensor:
    return torch.le(*together(a, b))


def And(a: Operand, b: Operand) -> torch.Tensor:
    return torch.logical_and(*together(a, b))


def Or(a: Operand, b: Operand) -> torch.Tensor:
    return torch.logical_or(*together(a, b))


def Not(x: Operand) -> torch.Tensor:
    return torch.logical_not(tensor(x))


def Cast(x: Operand, *, to: int, saturate: int = 1) -> torch.Tensor:
    return tensor(x).to(torch_dtype(to))


def CastLike(x: Operand, like: Operand, *, saturate: int = 1) -> torch.Tensor:
    return tensor(x).to(tensor(like).dtype)


def Identity(x: Operand) -> torch.Tensor:
    return tensor(x)


def Neg(x: Operand) -> torch.Tensor:
    return torch.neg(tensor(x))


def Abs(x: Operand) -> torch.Tensor:
    return torch.abs(tensor(x))


def Sign(x: Operand) -> torch.Tensor:
    return torch.sign(tensor(x))


def Sqrt(x: Operand) -> torch.Tensor:
    return torch.sqrt(tensor(x))


def Reciprocal(x: Operand) -> torch.Tensor:
    return torch.reciprocal(tensor(x))


def Exp(x: Operand) -> torch.Tensor:
    return torch.exp(tensor(x))


def Log(x: Operand) -> torch.Tensor:
    return torch.log(tensor(x))


def Sin(x: Operand) -> torch.Tensor:
    return torch.sin(tensor(x))


def Cos(x: Operand) -> torch.Tensor:
    return torch.cos(tensor(x))


def Tanh(x: Operand) -> torch.Tensor:
    return torch.tanh(tensor(x))


def Erf(x: Operand) -> torch.Tensor:
    return torch.erf(tensor(x))


def Floor(x: Operand) -> torch.Tensor:
    return torch.floor(tensor(x))


def Ceil(x: Operand) -> torch.Tensor:
    return torch.ceil(tensor(x))


def Round(x: Operand) -> torch.Tensor:
    """Halves go to the even neighbour, in torch as in ONNX. Gradients pass unchanged, as in quantizers."""
    value = tensor(x)
    return with_gradient_of(torch.round(value), value)


def Sigmoid(x: Operand) -> torch.Tensor:
    return torch.sigmoid(tensor(x))


def HardSigmoid(x: Operand, *, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    return torch.clamp(alpha * tensor(x) + beta, 0, 1)


def HardSwish(x: Operand) -> torch.Tensor:
    return functional.hardswish(tensor(x))


def Swish(x: Operand, *, alpha: float = 1.0) -> torch.Tensor:
    given = tensor(x)
    return given * torch.sigmoid(alpha * given)


def Relu(x: Operand) -> torch.Tensor:
    return torch.relu(tensor(x))


def LeakyRelu(x: Operand, *, alpha: float = 0.01) -> torch.Tensor:
    return functional.leaky_relu(tensor(x), alpha)


def ThresholdedRelu(x: Operand, *, alpha: float = 1.0) -> torch.Tensor:
    return functional.threshold(tensor(x), alpha, 0.0)


def PRelu(x: Operand, slope: Operand) -> torch.Tensor:
    given, factor = together(x, slope)
    return torch.where(given < 0, factor * given, given)


def Elu(x: Operand, *, alpha: float = 1.0) -> torch.Tensor:
    return functional.elu(tensor(x), alpha)


def Softplus(x: Operand) -> torch.Tensor:
    return functional.softplus(tensor(x))


def Mish(x: Operand) -> torch.Tensor:
    return functional.mish(tensor(x))


def Gelu(x: Operand, *, approximate: Literal["none", "tanh"] = "none") -> torch.Tensor:
    return functional.gelu(tensor(x), approximate=approximate)


def DequantizeLinear(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None, *, axis: int = 1
) -> torch.Tensor:
    """Only of integers that are constants; the pairs around activations and weights are quantizer modules."""
    shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)] if scale.numel() > 1 else []
    centred = x.to(scale.dtype) if zero_point is None else x.to(scale.dtype) - zero_point.to(scale.dtype).reshape(shape)
    return centred * scale.reshape(shape)


ELEMENTWISE_OPERATIONS: tuple[TorchFunction, ...] = (
    DequantizeLinear,
    *(Add, Sub, Mul, Div, Mod, Pow, Sum, Max, Min, Clip, Where, Cast, CastLike, Identity),
    *(Equal, Greater, GreaterOrEqual, Less, LessOrEqual, And, Or, Not),
    *(Neg, Abs, Sign, Sqrt, Reciprocal, Exp, Log, Sin, Cos, Tanh, Erf, Floor, Ceil, Round),
    *(Sigmoid, HardSigmoid, HardSwish, Swish, Relu, LeakyRelu, ThresholdedRelu, PRelu, Elu, Softplus, Mish, Gelu),
)
