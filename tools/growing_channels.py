"""Random graphs with channels to spare: layers of several widths among operators that move, join and split channels."""

from __future__ import annotations

import random
from typing import Any

import growing
import growing_layers
import numpy as np
from growing import derived
from growing_layers import Made
from onnx import helper
from random_graphs import SIZES, Dim, Graph, Value
from random_graphs import dim as fixed

_MOST_CHANNELS = 12


def _weight(g: Graph, *shape: int) -> str:
    seed = g.rnd.randrange(2**31)
    return g.constant(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _image(v: Value) -> bool:
    return v.dtype == "float32" and v.rank == 4 and 1 < (v.dims[1].fixed or 0) <= _MOST_CHANNELS


def conv(g: Graph) -> None:
    """Of any number of groups that fits; at times depthwise, at times transposed."""
    v = g.any(_image)
    if v is None:
        return
    channels = v.dims[1].sizes[0]
    group = g.pick([1, 1, 1, channels, *[d for d in range(2, channels) if channels % d == 0]])
    out = group * g.pick([1, 2]) if group > 1 else g.pick([2, 3, 4, 6])
    transposed = g.maybe(0.25)
    shape = (channels, out // group, 1, 1) if transposed else (out, channels // group, 1, 1)
    names = [v.name, _weight(g, *shape)] + ([_weight(g, out)] if g.maybe(0.5) else [])
    kind = "ConvTranspose" if transposed else "Conv"
    made = g.add(kind, names, v.dtype, [v.dims[0], fixed(out), *v.dims[2:]], True, kernel_shape=[1, 1], group=group)
    if g.maybe(0.3):
        growing_layers.normalize(g, made)


def matmul(g: Graph) -> None:
    """By a weight, on the last axis; at times between two computed values."""
    v = g.any(lambda v: v.dtype == "float32" and v.rank > 1 and 1 < (v.dims[-1].fixed or 0) <= _MOST_CHANNELS)
    if v is None:
        return
    if g.maybe(0.2) and v.rank > 2:
        turned = [*range(v.rank - 2), v.rank - 1, v.rank - 2]
        dims = [v.dims[a] for a in turned]
        other = g.add("Transpose", [v.name], v.dtype, dims, True, perm=turned)
        g.add("MatMul", [v.name, other.name], v.dtype, [*v.dims[:-1], v.dims[-2]], True)
        return
    inner, out = v.dims[-1].sizes[0], g.pick([2, 3, 4, 6])
    made = g.add("MatMul", [v.name, _weight(g, inner, out)], v.dtype, [*v.dims[:-1], fixed(out)], True)
    if g.maybe(0.5):
        g.add("Add", [made.name, _weight(g, out)], v.dtype, made.dims, True)


def recurrent(g: Graph) -> None:
    """A GRU or LSTM, in one direction or both; its directions become channels."""
    v = g.any(lambda v: v.dtype == "float32" and v.rank == 3 and 1 < (v.dims[-1].fixed or 0) <= _MOST_CHANNELS)
    if v is None:
        return
    kind, directions, hidden = g.pick(["GRU", "LSTM"]), g.pick([1, 2]), g.pick([2, 3])
    rows = {"GRU": 3, "LSTM": 4}[kind] * hidden
    names = [v.name, _weight(g, directions, rows, v.dims[-1].sizes[0]), _weight(g, directions, rows, hidden)]
    dims = [v.dims[0], fixed(directions), v.dims[1], fixed(hidden)]
    way = "bidirectional" if directions == 2 else "forward"
    made = g.add(kind, names, v.dtype, dims, True, hidden_size=hidden, direction=way)
    turned = g.add("Transpose", [made.name], v.dtype, [dims[0], dims[2], dims[1], dims[3]], True, perm=[0, 2, 1, 3])
    flat = [dims[0], dims[2], fixed(directions * hidden)]
    g.add("Reshape", [turned.name, g.constant(np.array([0, 0, -1], np.int64))], v.dtype, flat, True)


def regroup(g: Graph) -> None:
    """Channels in two axes, as a shuffle or heads have them, turned or not, and back."""
    v = g.any(lambda v: _image(v) and (v.dims[1].fixed or 1) % 2 == 0)
    if v is None:
        return
    half = v.dims[1].sizes[0] // 2
    split = [v.dims[0], fixed(2), fixed(half), *v.dims[2:]]
    x = g.add("Reshape", [v.name, _target(g, split)], v.dtype, split, True) if _known(split) else None
    if x is None:
        return
    if g.maybe(0.6):
        dims = [split[0], split[2], split[1], *split[3:]]
        x = g.add("Transpose", [x.name], v.dtype, dims, True, perm=[0, 2, 1, 3, 4])
    g.add("Reshape", [x.name, _target(g, v.dims)], v.dtype, v.dims, True)


def _known(dims: Any) -> bool:
    return sum(d.fixed is None for d in dims[1:]) <= 1


def _target(g: Graph, dims: Any) -> str:
    return g.constant(np.array([0, *(d.fixed if d.fixed is not None else -1 for d in dims[1:])], np.int64))


def blocks(g: Graph) -> None:
    """DepthToSpace or SpaceToDepth."""
    v = g.any(_image)
    if v is None:
        return
    if v.dims[1].sizes[0] % 4 == 0:
        dims = [v.dims[0], fixed(v.dims[1].sizes[0] // 4), *(_times(d, 2) for d in v.dims[2:])]
        g.add("DepthToSpace", [v.name], v.dtype, dims, True, blocksize=2, mode=g.pick(["DCR", "CRD"]))
    elif all(size % 2 == 0 for d in v.dims[2:] for size in d.sizes) and v.dims[1].sizes[0] < 4:
        dims = [v.dims[0], fixed(v.dims[1].sizes[0] * 4), *(_times(d, 0.5) for d in v.dims[2:])]
        g.add("SpaceToDepth", [v.name], v.dtype, dims, True, blocksize=2)


def _times(d: Dim, factor: float) -> Dim:
    return derived((int(d.sizes[0] * factor), int(d.sizes[1] * factor)), d)


GROWN = (
    *(conv, conv, conv, conv, matmul, matmul, matmul, recurrent, regroup, regroup, blocks),
    *(growing.unary, growing.clip, growing.with_constant, growing.binary, growing.binary, growing.where),
    *(growing.transpose, growing.transpose, growing.reshape, growing.reshape, growing.flatten, growing.squeeze),
    *(growing.unsqueeze, growing.slice_, growing.concat, growing.concat, growing.split, growing.pad, growing.gather),
    *(growing.expand, growing.tile, growing.reduce, growing.softmax, growing_layers.normalize, growing_layers.pool),
    growing_layers.layer_norm,
)


def make(rnd: random.Random, nodes: int = 18) -> Made:
    """A model of about so many nodes whose outputs a layer makes, so that what lies before is free to shrink."""
    graph = Graph(rnd, rnd.choice([13, 17, 21]), GROWN)
    axes = [Dim((SIZES[0][n], SIZES[1][n]), n) for n in ("N", "T")]
    x = Value("x", "float32", (axes[0], fixed(2), axes[1], fixed(4)), True)
    graph.values = [x]
    for _ in range(2):
        conv(graph)
    for _ in range(rnd.randrange(4, nodes + 1)):
        graph.grow()
    read = {n for node in graph.nodes for n in node.input}
    ends = [v for v in graph.values[1:] if v.name not in read and v.is_float]
    outputs = []
    for value in ends[-3:] or graph.values[-1:]:
        last = value.dims[-1].fixed if value.rank > 1 else None
        if last is not None and value.dtype == "float32":
            name = _weight(graph, last, 2)
            value = graph.add("MatMul", [value.name, name], value.dtype, [*value.dims[:-1], fixed(2)], True)
        outputs.append(value)
    proto = graph.proto("channels", [x], outputs)
    version = 10 if graph.opset == 21 else 8
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=version)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=[d.sizes[i] for d in x.dims]).astype(np.float32)} for i in (0, 1)]
    return Made(model, feeds, frozenset(v.name for v in outputs), {})


def graphs() -> Any:
    """A hypothesis strategy of :class:`Made`."""
    from hypothesis import strategies as st

    return st.randoms(use_true_random=False).map(make)
