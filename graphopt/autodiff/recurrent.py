"""LSTM, GRU and RNN, step by step: shapes are known, so the steps are too.

The input's products are taken for all steps at once; only the recurrent ones are left in the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from graphopt.autodiff.rules import Call, lowering

_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_PLAIN = frozenset({"Sigmoid", "Tanh", "Relu", "Softsign", "Softplus"})
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass
class _Cell:
    """One direction of a layer. All names: ``x`` [T, B, I], ``r`` the recurrent weights turned, ``h`` and ``c`` the
    state [B, H]."""

    call: Call
    hidden: int
    batch: int
    steps: int
    functions: list[Callable[[str], str]]
    products: list[str]
    r: list[str]
    rb: list[str]
    peepholes: list[str]
    keep: list[str]


@lowering("LSTM", "GRU", "RNN")
def _recurrent(c: Call) -> list[str]:
    e = c.e
    kind = c.node.op_type
    if c.attribute("layout", 0):
        raise NotImplementedError("its layout is batch first")
    steps, batch, _ = c.shape(c.x[0])
    hidden = c.shape(c.x[2])[2]
    directions = c.shape(c.x[1])[0]
    way = c.attribute("direction", "forward")
    lengths = c.x[4] if c.has(4) else None
    if lengths is not None and lengths in c.constants and (c.constants[lengths] == steps).all():
        lengths = None
    outputs: list[list[str]] = []
    last_h, last_c = [], []
    for index in range(directions):
        backward = way == "reverse" or (way == "bidirectional" and index == 1)
        cell = _cell(c, kind, index, steps, batch, hidden, backward, lengths)
        state = [_initial(c, 5, index, batch, hidden)]
        if kind == "LSTM":
            state.append(_initial(c, 6, index, batch, hidden))
        seen = []
        step = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[kind]
        for t in range(steps):
            after = step(cell, t, state)
            shown = after[0]
            if cell.keep:  # past its end a sequence's state stays, and its output is 0
                shown = e("Mul", after[0], cell.keep[t])
                state = [e("Where", e("Cast", cell.keep[t], to=9), n, o) for n, o in zip(after, state, strict=True)]
            else:
                state = after
            seen.append(e.reshape(shown, (1, batch, hidden)))
        joined = e.concat(seen if not backward or cell.keep else seen[::-1], 0)
        if backward and cell.keep:
            assert lengths is not None
            joined = e("ReverseSequence", joined, e("Cast", lengths, to=7), time_axis=0, batch_axis=1)
        outputs.append([e.reshape(joined, (steps, 1, batch, hidden))])
        last_h.append(e.reshape(state[0], (1, batch, hidden)))
        last_c.append(e.reshape(state[-1], (1, batch, hidden)))
    found = [e.concat([o[0] for o in outputs], 1), e.concat(last_h, 0)]
    return [*found, e.concat(last_c, 0)] if kind == "LSTM" else found


def _initial(c: Call, index: int, direction: int, batch: int, hidden: int) -> str:
    if not c.has(index):
        return c.e.zeros((batch, hidden))
    return c.e.reshape(c.e.slice(c.x[index], [0], [direction], [direction + 1], [1]), (batch, hidden))


def _part(c: Call, name: str, direction: int, start: int, size: int) -> str:
    """Rows ``start`` to ``start + size`` of one direction, without the leading dim."""
    e = c.e
    shape = c.shape(name)
    cut = e.slice(name, [0, 1], [direction, start], [direction + 1, start + size], [1, 1])
    return e.reshape(cut, (size, *shape[2:]))


def _cell(
    c: Call, kind: str, d: int, steps: int, batch: int, hidden: int, backward: bool, lengths: str | None
) -> _Cell:
    e = c.e
    if c.attribute("clip", None) is not None or c.attribute("input_forget", 0):
        raise NotImplementedError("it clips, or couples its gates")
    x, keep = c.x[0], []
    if lengths is not None:
        whole = e("Cast", lengths, to=7)
        if backward:
            x = e("ReverseSequence", x, whole, time_axis=0, batch_axis=1)
        for t in range(steps):
            less = e("Less", e.constant(np.int64(t)), whole)
            keep.append(e.reshape(e("Cast", less, to=1), (batch, 1)))
    elif backward:
        x = e.slice(x, [0], [-1], [-(2**31)], [-1])
    gates, size = _GATES[kind], c.shape(x if x in c.shapes else c.x[0])[2]
    flat = e.reshape(x, (steps * batch, size))
    weights = e.transpose(_part(c, c.x[1], d, 0, gates * hidden), [1, 0])
    product = e("MatMul", flat, weights)
    separate: list[str] = []
    if c.has(3):
        w_bias = _part(c, c.x[3], d, 0, gates * hidden)
        r_bias = _part(c, c.x[3], d, gates * hidden, gates * hidden)
        if kind == "GRU" and c.attribute("linear_before_reset", 0):  # the last gate's is inside the reset
            product = e("Add", product, w_bias)
            separate = [r_bias]
        else:
            product = e("Add", product, e("Add", w_bias, r_bias))
    wide = e.reshape(product, (steps, batch, gates * hidden))
    products = [e.reshape(e.slice(wide, [0], [t], [t + 1], [1]), (batch, gates * hidden)) for t in range(steps)]
    turned = e.transpose(_part(c, c.x[2], d, 0, gates * hidden), [1, 0])
    peep = [_part(c, c.x[7], d, i * hidden, hidden) for i in range(3)] if kind == "LSTM" and c.has(7) else []
    return _Cell(c, hidden, batch, steps, _functions(c, kind, d), products, [turned], separate, peep, keep)


def _functions(c: Call, kind: str, direction: int) -> list[Callable[[str], str]]:
    names = c.attribute("activations", None)
    count = len(_DEFAULTS[kind])
    chosen = _DEFAULTS[kind]
    if names:
        texts = [n.decode() if isinstance(n, bytes) else n for n in names]
        chosen = texts[direction * count : (direction + 1) * count]
    if not set(chosen) <= _PLAIN:
        raise NotImplementedError(f"its activations {', '.join(chosen)}")
    return [lambda v, op=op: c.e(op, v) for op in chosen]  # type: ignore[misc]


def _gate(cell: _Cell, value: str, index: int) -> str:
    h = cell.hidden
    return cell.call.e.slice(value, [1], [index * h], [(index + 1) * h], [1])


def _lstm(cell: _Cell, t: int, state: list[str]) -> list[str]:
    """Gates in ONNX's order: input, output, forget, cell."""
    e = cell.call.e
    h, c = state
    f, g, last = cell.functions
    total = e("Add", cell.products[t], e("MatMul", h, cell.r[0]))
    i, o, forget, new = (_gate(cell, total, k) for k in range(4))
    if cell.peepholes:
        i = e("Add", i, e("Mul", cell.peepholes[0], c))
        forget = e("Add", forget, e("Mul", cell.peepholes[2], c))
    kept = e("Add", e("Mul", f(forget), c), e("Mul", f(i), g(new)))
    if cell.peepholes:
        o = e("Add", o, e("Mul", cell.peepholes[1], kept))
    return [e("Mul", f(o), last(kept)), kept]


def _gru(cell: _Cell, t: int, state: list[str]) -> list[str]:
    """Gates in ONNX's order: update, reset, hidden."""
    e = cell.call.e
    (h,) = state
    f, g = cell.functions
    n = cell.hidden
    x = cell.products[t]
    if cell.call.attribute("linear_before_reset", 0):
        r = e("MatMul", h, cell.r[0])
        r = e("Add", r, cell.rb[0]) if cell.rb else r
        update = f(e("Add", _gate(cell, x, 0), _gate(cell, r, 0)))
        reset = f(e("Add", _gate(cell, x, 1), _gate(cell, r, 1)))
        new = g(e("Add", _gate(cell, x, 2), e("Mul", reset, _gate(cell, r, 2))))
    else:
        both = e("MatMul", h, e.slice(cell.r[0], [1], [0], [2 * n], [1]))
        update = f(e("Add", _gate(cell, x, 0), e.slice(both, [1], [0], [n], [1])))
        reset = f(e("Add", _gate(cell, x, 1), e.slice(both, [1], [n], [2 * n], [1])))
        own = e("MatMul", e("Mul", reset, h), e.slice(cell.r[0], [1], [2 * n], [3 * n], [1]))
        new = g(e("Add", _gate(cell, x, 2), own))
    return [e("Add", e("Mul", e("Sub", e.number(1), update), new), e("Mul", update, h))]


def _rnn(cell: _Cell, t: int, state: list[str]) -> list[str]:
    e = cell.call.e
    return [cell.functions[0](e("Add", cell.products[t], e("MatMul", state[0], cell.r[0])))]
