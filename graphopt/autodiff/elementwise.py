"""Operators of one tensor, element by element: ``gx = g * derivative``.

Where it can be told from the output, it is: then the runtime may still fuse the operator into the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from graphopt.autodiff.rules import Call, rule, steps

Derivative = Callable[[Call, str, str], str]
"""(call, x, y) -> the derivative, element by element."""

steps(
    "Sign", "Floor", "Ceil", "Round", "Shape", "Size", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual",
    "Not", "And", "Or", "Xor", "IsNaN", "IsInf", "ArgMax", "ArgMin", "NonZero", "OneHot", "ConstantOfShape",
    "RandomNormalLike", "RandomUniformLike", "EyeLike", "Range", "BitShift",
)  # fmt: skip


def _elementwise(operator: str) -> Callable[[Derivative], Derivative]:
    """Register a derivative as the rule of ``operator``."""

    def register(derivative: Derivative) -> Derivative:
        def apply(c: Call) -> None:
            c.give(0, c.e("Mul", c.grad, derivative(c, c.x[0], c.y[0])))

        rule(operator)(apply)
        return derivative

    return register


def _indicator(c: Call, condition: str) -> str:
    return c.e("Cast", condition, to=onnx.TensorProto.FLOAT)


def _positive(c: Call, value: str) -> str:
    return c.e("Greater", value, c.e.number(0))


def _between(c: Call, value: str, low: float, high: float) -> str:
    """1 where ``low < value < high``, else 0."""
    e = c.e
    return _indicator(c, e("And", e("Greater", value, e.number(low)), e("Less", value, e.number(high))))


@rule("Identity", "Dropout")
def _identity(c: Call) -> None:
    c.give(0, c.grad)


@rule("Cast", "CastLike")
def _cast(c: Call) -> None:
    c.give(0, c.e("Cast", c.grad, to=c.kinds[c.x[0]]))


@rule("Neg")
def _negated(c: Call) -> None:
    c.give(0, c.e("Neg", c.grad))


@_elementwise("Relu")
def _relu(c: Call, x: str, y: str) -> str:
    return _indicator(c, _positive(c, y))


@_elementwise("Sigmoid")
def _sigmoid(c: Call, x: str, y: str) -> str:
    return c.e("Mul", y, c.e("Sub", c.e.number(1), y))


@_elementwise("Tanh")
def _tanh(c: Call, x: str, y: str) -> str:
    return c.e("Sub", c.e.number(1), c.e("Mul", y, y))


@_elementwise("Exp")
def _exp(c: Call, x: str, y: str) -> str:
    return y


@_elementwise("Log")
def _log(c: Call, x: str, y: str) -> str:
    return c.e("Reciprocal", x)


@_elementwise("Sqrt")
def _sqrt(c: Call, x: str, y: str) -> str:
    return c.e("Div", c.e.number(0.5), y)


@_elementwise("Reciprocal")
def _reciprocal(c: Call, x: str, y: str) -> str:
    return c.e("Neg", c.e("Mul", y, y))


@_elementwise("Abs")
def _abs(c: Call, x: str, y: str) -> str:
    return c.e("Sign", x)


@_elementwise("Erf")
def _erf(c: Call, x: str, y: str) -> str:
    e = c.e
    return e.times(e("Exp", e("Neg", e("Mul", x, x))), 2 / math.sqrt(math.pi))


@_elementwise("LeakyRelu")
def _leaky(c: Call, x: str, y: str) -> str:
    alpha, e = c.attribute("alpha", 0.01), c.e
    inside = e.times(_indicator(c, _positive(c, x)), 1 - alpha)
    return e("Add", inside, e.number(alpha))


@_elementwise("ThresholdedRelu")
def _thresholded(c: Call, x: str, y: str) -> str:
    return _indicator(c, c.e("Greater", x, c.e.number(c.attribute("alpha", 1.0))))


@_elementwise("Elu")
def _elu(c: Call, x: str, y: str) -> str:
    return _exponential(c, x, c.attribute("alpha", 1.0), 1.0)


@_elementwise("Selu")
def _selu(c: Call, x: str, y: str) -> str:
    gamma = c.attribute("gamma", 1.0507010221481323)
    return c.e.times(_exponential(c, x, c.attribute("alpha", 1.6732631921768188), 1.0), gamma)


@_elementwise("Celu")
def _celu(c: Call, x: str, y: str) -> str:
    return _exponential(c, x, 1.0, c.attribute("alpha", 1.0))


def _exponential(c: Call, x: str, factor: float, width: float) -> str:
    """1 above 0, ``factor * exp(x / width)`` below."""
    e = c.e
    below = e("Min", x, e.number(0))  # the branch that is not taken must not overflow
    grown = e.times(e("Exp", e.times(below, 1 / width)), factor)
    positive = _indicator(c, _positive(c, x))
    return e("Add", positive, e("Mul", grown, e("Sub", e.number(1), positive)))


@_elementwise("Softplus")
def _softplus(c: Call, x: str, y: str) -> str:
    return c.e("Sigmoid", x)


@_elementwise("Softsign")
def _softsign(c: Call, x: str, y: str) -> str:
    e = c.e
    grown = e("Add", e.number(1), e("Abs", x))
    return e("Reciprocal", e("Mul", grown, grown))


@_elementwise("HardSigmoid")
def _hard_sigmoid(c: Call, x: str, y: str) -> str:
    return c.e.times(_between(c, y, 0, 1), c.attribute("alpha", 0.2))


@_elementwise("HardSwish")
def _hard_swish(c: Call, x: str, y: str) -> str:
    e = c.e
    gate = e("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    return e("Add", gate, e("Mul", e.times(x, 1 / 6), _between(c, x, -3, 3)))


@_elementwise("Gelu")
def _gelu(c: Call, x: str, y: str) -> str:
    e = c.e
    if c.attribute("approximate", "none") == "tanh":
        root = math.sqrt(2 / math.pi)
        square = e("Mul", x, x)
        inner = e("Mul", e.times(x, root), e("Add", e.number(1), e.times(square, 0.044715)))
        tanh = e("Tanh", inner)
        slope = e.times(e("Add", e.number(1), e.times(square, 3 * 0.044715)), root)
        grown = e("Mul", e("Mul", x, e("Sub", e.number(1), e("Mul", tanh, tanh))), slope)
        return e.times(e("Add", e("Add", e.number(1), tanh), grown), 0.5)
    share = e.times(e("Add", e.number(1), e("Erf", e.times(x, math.sqrt(0.5)))), 0.5)
    density = e.times(e("Exp", e.times(e("Mul", x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return e("Add", share, e("Mul", x, density))


@_elementwise("Mish")
def _mish(c: Call, x: str, y: str) -> str:
    e = c.e
    tanh = e("Tanh", e("Softplus", x))
    slope = e("Mul", e("Sub", e.number(1), e("Mul", tanh, tanh)), e("Sigmoid", x))
    return e("Add", tanh, e("Mul", x, slope))


@_elementwise("Sin")
def _sin(c: Call, x: str, y: str) -> str:
    return c.e("Cos", x)


@_elementwise("Cos")
def _cos(c: Call, x: str, y: str) -> str:
    return c.e("Neg", c.e("Sin", x))


@_elementwise("Tan")
def _tan(c: Call, x: str, y: str) -> str:
    return c.e("Add", c.e.number(1), c.e("Mul", y, y))


@_elementwise("Sinh")
def _sinh(c: Call, x: str, y: str) -> str:
    return c.e("Cosh", x)


@_elementwise("Cosh")
def _cosh(c: Call, x: str, y: str) -> str:
    return c.e("Sinh", x)


def _inverse_root(c: Call, x: str, sign: float, constant: float) -> str:
    """``1 / sqrt(constant + sign * x^2)``."""
    e = c.e
    return e("Reciprocal", e("Sqrt", e("Add", e.number(constant), e.times(e("Mul", x, x), sign))))


@_elementwise("Asin")
def _asin(c: Call, x: str, y: str) -> str:
    return _inverse_root(c, x, -1, 1)


@_elementwise("Acos")
def _acos(c: Call, x: str, y: str) -> str:
    return c.e("Neg", _inverse_root(c, x, -1, 1))


@_elementwise("Asinh")
def _asinh(c: Call, x: str, y: str) -> str:
    return _inverse_root(c, x, 1, 1)


@_elementwise("Acosh")
def _acosh(c: Call, x: str, y: str) -> str:
    return _inverse_root(c, x, 1, -1)


@_elementwise("Atan")
def _atan(c: Call, x: str, y: str) -> str:
    return c.e("Reciprocal", c.e("Add", c.e.number(1), c.e("Mul", x, x)))


@_elementwise("Atanh")
def _atanh(c: Call, x: str, y: str) -> str:
    return c.e("Reciprocal", c.e("Sub", c.e.number(1), c.e("Mul", x, x)))


@_elementwise("Clip")
def _clip(c: Call, x: str, y: str) -> str:
    """1 strictly between the bounds: what sits on one is held there."""
    bounds = []
    for index, beyond in ((1, -np.inf), (2, np.inf)):
        bounds.append(float(c.number(index).reshape(())) if c.has(index) else beyond)
    low, high = bounds
    if np.isinf(low) and np.isinf(high):
        return c.e.number(1)
    if np.isinf(high):
        return _indicator(c, c.e("Greater", y, c.e.number(low)))
    if np.isinf(low):
        return _indicator(c, c.e("Less", y, c.e.number(high)))
    return _between(c, y, low, high)
