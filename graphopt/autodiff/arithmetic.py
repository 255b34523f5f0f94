"""Operators of several tensors that broadcast: each gradient is summed back to the shape it came from."""

from __future__ import annotations

from graphopt.autodiff.rules import Call, rule


def _give(c: Call, index: int, gradient: str) -> None:
    """``gradient`` in the output's shape, summed to the input's."""
    c.give(index, c.e.sum_to(gradient, c.shape(c.y[0]), c.shape(c.x[index])))


@rule("Add", "Sum")
def _add(c: Call) -> None:
    for index in range(len(c.x)):
        if c.wants(index):
            _give(c, index, c.grad)


@rule("Mean")
def _mean(c: Call) -> None:
    share = c.e.times(c.grad, 1 / len(c.x))
    for index in range(len(c.x)):
        if c.wants(index):
            _give(c, index, share)


@rule("Sub")
def _sub(c: Call) -> None:
    if c.wants(0):
        _give(c, 0, c.grad)
    if c.wants(1):  # summed first: it is smaller then
        c.give(1, c.e("Neg", c.e.sum_to(c.grad, c.shape(c.y[0]), c.shape(c.x[1]))))


@rule("Mul")
def _mul(c: Call) -> None:
    for index in (0, 1):
        if c.wants(index):
            _give(c, index, c.e("Mul", c.grad, c.x[1 - index]))


@rule("Div")
def _div(c: Call) -> None:
    share = c.e("Div", c.grad, c.x[1])
    if c.wants(0):
        _give(c, 0, share)
    if c.wants(1):
        _give(c, 1, c.e("Neg", c.e("Mul", share, c.y[0])))


@rule("Pow")
def _pow(c: Call) -> None:
    e = c.e
    base, power = c.x
    if c.wants(0):
        exponent = c.constants.get(power)
        if exponent is not None and exponent.size == 1:
            value = float(exponent.reshape(()))
            less = base if value == 2 else e("Pow", base, e.number(value - 1))
            derivative = e.times(less, value)
        else:
            real = power if c.kinds[power] == 1 else e("Cast", power, to=1)
            derivative = e("Mul", real, e("Pow", base, e("Sub", real, e.number(1))))
        _give(c, 0, e("Mul", c.grad, derivative))
    if c.wants(1):
        _give(c, 1, e("Mul", c.grad, e("Mul", c.y[0], e("Log", base))))


@rule("Max", "Min")
def _extreme(c: Call) -> None:
    """To the first that is the extreme."""
    e, rest = c.e, c.grad
    for index, name in enumerate(c.x):
        here = e("Equal", name, c.y[0])
        share = e.mask(here, rest)
        if c.wants(index):
            _give(c, index, share)
        if index + 1 < len(c.x):
            rest = e("Sub", rest, share)


@rule("PRelu")
def _prelu(c: Call) -> None:
    e = c.e
    negative = e("Less", c.x[0], e.number(0))
    below = e.mask(negative, c.grad)
    if c.wants(0):
        above = e("Sub", c.grad, below)
        _give(c, 0, e("Add", above, e("Mul", below, c.x[1])))
    if c.wants(1):
        _give(c, 1, e("Mul", below, c.x[0]))


@rule("Where")
def _where(c: Call) -> None:
    chosen = c.e.mask(c.x[0], c.grad)
    if c.wants(1):
        _give(c, 1, chosen)
    if c.wants(2):
        _give(c, 2, c.e("Sub", c.grad, chosen))


@rule("Mod")
def _mod(c: Call) -> None:
    if c.wants(1):
        raise NotImplementedError("the divisor is trained")
    _give(c, 0, c.grad)
