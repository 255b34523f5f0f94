"""MatMul, Gemm and Einsum."""

from __future__ import annotations

import math

from graphopt.autodiff.rules import Call, rule


def _swapped(c: Call, name: str, rank: int) -> str:
    """The last two axes exchanged."""
    return c.e.transpose(name, [*range(rank - 2), rank - 1, rank - 2])


@rule("MatMul")
def _matmul(c: Call) -> None:
    e = c.e
    a, b = c.x
    a_shape, b_shape = c.shape(a), c.shape(b)
    left = a_shape if len(a_shape) > 1 else (1, *a_shape)
    right = b_shape if len(b_shape) > 1 else (*b_shape, 1)
    batch = c.shape(c.y[0])
    batch = batch[: len(batch) - (len(a_shape) > 1) - (len(b_shape) > 1)]
    full = (*batch, left[-2], right[-1])
    a_in = a if left == a_shape else e.reshape(a, left)
    b_in = b if right == b_shape else e.reshape(b, right)
    g = c.grad if full == c.shape(c.y[0]) else e.reshape(c.grad, full)
    if len(right) == 2 and len(left) > 2:  # a layer: all that leads is one axis of rows
        rows = math.prod(left[:-1])
        g = e.reshape(g, (rows, right[-1]))
        if c.wants(0):
            c.give(0, e.reshape(e("MatMul", g, _swapped(c, b_in, 2)), a_shape))
        if c.wants(1):
            flat = e.transpose(e.reshape(a_in, (rows, left[-1])), [1, 0])
            found = e("MatMul", flat, g)
            c.give(1, found if right == b_shape else e.reshape(found, b_shape))
        return
    if c.wants(0):
        found = e("MatMul", g, _swapped(c, b_in, len(right)))
        summed = e.sum_to(found, (*batch, *left[-2:]), left)
        c.give(0, summed if left == a_shape else e.reshape(summed, a_shape))
    if c.wants(1):
        found = e("MatMul", _swapped(c, a_in, len(left)), g)
        summed = e.sum_to(found, (*batch, *right[-2:]), right)
        c.give(1, summed if right == b_shape else e.reshape(summed, b_shape))


@rule("Gemm")
def _gemm(c: Call) -> None:
    e = c.e
    alpha, beta = float(c.attribute("alpha", 1.0)), float(c.attribute("beta", 1.0))
    turn_a, turn_b = int(c.attribute("transA", 0)), int(c.attribute("transB", 0))
    a, b = c.x[:2]
    if c.wants(0):  # A' = alpha G B'^T, and the transposed where A is stored so
        pair = (b, c.grad) if turn_a else (c.grad, b)
        turns = (turn_b, 1) if turn_a else (0, 1 - turn_b)
        c.give(0, e("Gemm", *pair, alpha=alpha, transA=turns[0], transB=turns[1]))
    if c.wants(1):
        pair = (c.grad, a) if turn_b else (a, c.grad)
        turns = (1, turn_a) if turn_b else (1 - turn_a, 0)
        c.give(1, e("Gemm", *pair, alpha=alpha, transA=turns[0], transB=turns[1]))
    if c.wants(2):
        c.give(2, e.times(e.sum_to(c.grad, c.shape(c.y[0]), c.shape(c.x[2])), beta))


@rule("Einsum")
def _einsum(c: Call) -> None:
    """Each operand's gradient is an Einsum too, where its letters are all in the output or the other operands."""
    text = "".join(c.attribute("equation", "").split())
    if "." in text or "->" not in text:
        raise NotImplementedError(f"the equation '{text}'")
    left, out = text.split("->")
    terms = left.split(",")
    for index, term in enumerate(terms):
        if not c.wants(index):
            continue
        others = [t for i, t in enumerate(terms) if i != index]
        seen = set(out).union(*others) if others else set(out)
        if len(set(term)) < len(term) or not set(term) <= seen:
            raise NotImplementedError(f"the equation '{text}'")
        names = [c.grad, *(name for i, name in enumerate(c.x) if i != index)]
        c.give(index, c.e("Einsum", *names, equation=f"{','.join([out, *others])}->{term}"))
