"""Reductions: the gradient goes back to every element that was taken in."""

from __future__ import annotations

import math

from graphopt.autodiff.rules import Call, rule


def _axes(c: Call) -> list[int]:
    rank = len(c.shape(c.x[0]))
    given = c.number(1).reshape(-1).tolist() if c.has(1) else c.attribute("axes", None)
    if not given:
        return [] if c.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(a) % rank for a in given)


def _kept(c: Call, name: str, axes: list[int]) -> str:
    """``name``, in the output's shape, with the reduced dims as 1."""
    shape = c.shape(c.x[0])
    kept = tuple(1 if i in axes else dim for i, dim in enumerate(shape))
    return name if c.shape(c.y[0]) == kept else c.e.reshape(name, kept)


@rule("ReduceSum")
def _sum(c: Call) -> None:
    c.give(0, c.e("Expand", _kept(c, c.grad, _axes(c)), c.e.integers(c.shape(c.x[0]))))


@rule("ReduceMean")
def _mean(c: Call) -> None:
    axes = _axes(c)
    count = math.prod(c.shape(c.x[0])[a] for a in axes)
    share = c.e.times(_kept(c, c.grad, axes), 1 / max(count, 1))
    c.give(0, c.e("Expand", share, c.e.integers(c.shape(c.x[0]))))


@rule("ReduceMax", "ReduceMin")
def _extreme(c: Call) -> None:
    """To the extreme elements, in equal parts."""
    e, axes = c.e, _axes(c)
    hits = e("Cast", e("Equal", c.x[0], _kept(c, c.y[0], axes)), to=1)
    c.give(0, e("Mul", hits, e("Div", _kept(c, c.grad, axes), e.sum(hits, axes, keep=True))))


@rule("ReduceSumSquare")
def _square(c: Call) -> None:
    c.give(0, c.e("Mul", _kept(c, c.e.times(c.grad, 2), _axes(c)), c.x[0]))


@rule("ReduceL2")
def _l2(c: Call) -> None:
    c.give(0, c.e("Mul", _kept(c, c.e("Div", c.grad, c.y[0]), _axes(c)), c.x[0]))


@rule("ReduceL1")
def _l1(c: Call) -> None:
    c.give(0, c.e("Mul", _kept(c, c.grad, _axes(c)), c.e("Sign", c.x[0])))


@rule("ReduceLogSumExp")
def _log_sum_exp(c: Call) -> None:
    axes = _axes(c)
    share = c.e("Exp", c.e("Sub", c.x[0], _kept(c, c.y[0], axes)))
    c.give(0, c.e("Mul", _kept(c, c.grad, axes), share))


@rule("ReduceLogSum")
def _log_sum(c: Call) -> None:
    share = c.e("Div", c.grad, c.e("Exp", c.y[0]))
    c.give(0, c.e("Expand", _kept(c, share, _axes(c)), c.e.integers(c.shape(c.x[0]))))


@rule("ReduceProd")
def _product(c: Call) -> None:
    """Where no element is 0."""
    c.give(0, c.e("Div", _kept(c, c.e("Mul", c.grad, c.y[0]), _axes(c)), c.x[0]))


@rule("CumSum")
def _cumulative(c: Call) -> None:
    back = 1 - int(c.attribute("reverse", 0))
    c.give(0, c.e("CumSum", c.grad, c.x[1], reverse=back, exclusive=int(c.attribute("exclusive", 0))))
