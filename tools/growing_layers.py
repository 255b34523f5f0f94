"""More operators for random graphs: layers, shapes that are computed, and bodies; and the whole model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import growing
import numpy as np
import onnx
from growing import derived, ints
from onnx import TensorProto, helper
from random_graphs import FLOATS, OTHERS, SIZES, Dim, Graph, Value, info
from random_graphs import dim as fixed

LAYERS = ("float32",)


def _image(v: Value) -> bool:
    return v.dtype in LAYERS and v.rank == 4 and v.dims[1].fixed is not None


def _out(d: Dim, kernel: int, low: int, high: int, stride: int) -> Dim:
    sizes = tuple((s + low + high - kernel) // stride + 1 for s in d.sizes)
    return d if sizes == d.sizes and d.name else derived(sizes, d)


def conv(g: Graph) -> None:
    """With padding, stride, groups, a bias; at times with a normalization, a factor or a padding beside it."""
    v = g.any(_image)
    if v is None:
        return
    channels = v.dims[1].sizes[0]
    group = channels if g.maybe(0.3) else 1
    out = group * g.pick([1, 2])
    kernel, stride = g.pick([1, 2]), g.pick([1, 1, 2])
    low, high = g.pick([0, 1]), g.pick([0, 1])
    if min(min(d.sizes) for d in v.dims[2:]) + low + high < kernel or channels > 8:
        return
    weight = np.asarray(g.rnd.choices([-1, -0.5, 0.25, 1, 2], k=out * channels // group * kernel * kernel), np.float32)
    names = [v.name, g.constant(weight.reshape(out, channels // group, kernel, kernel))]
    names += [g.constant(np.linspace(-1, 1, out, dtype=np.float32))] if g.maybe(0.5) else []
    dims = [v.dims[0], fixed(out), *(_out(d, kernel, low, high, stride) for d in v.dims[2:])]
    pads = [low, low, high, high]
    made = g.add(
        "Conv", names, v.dtype, dims, True, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, group=group
    )
    if g.maybe(0.5):
        normalize(g, made)


def normalize(g: Graph, v: Value | None = None) -> None:
    """BatchNormalization, or a factor or summand per channel."""
    v = v or g.any(lambda v: v.dtype in LAYERS and v.rank > 1 and v.dims[1].fixed is not None)
    if v is None:
        return
    n = v.dims[1].sizes[0]
    per = [np.linspace(0.5, 1.5, n, dtype=np.float32) * k for k in (1.0, -0.5, 0.25, 2.0)]
    if g.maybe(0.6):
        names = [v.name, *(g.constant(a) for a in per)]
        g.add("BatchNormalization", names, v.dtype, v.dims, True, epsilon=g.pick([1e-5, 1e-3]))
    else:
        shape = (n, *[1] * (v.rank - 2))
        g.add(g.pick(["Mul", "Add"]), [v.name, g.constant(per[0].reshape(shape))], v.dtype, v.dims, True)


def conv_transpose(g: Graph) -> None:
    """The other way."""
    v = g.any(_image)
    if v is not None and v.dims[1].sizes[0] <= 4:
        weight = np.linspace(-1, 1, v.dims[1].sizes[0] * 2 * 4, dtype=np.float32).reshape(-1, 2, 2, 2)
        dims = [v.dims[0], fixed(2), *(derived(tuple(2 * s for s in d.sizes), d) for d in v.dims[2:])]
        made = g.add("ConvTranspose", [v.name, g.constant(weight)], v.dtype, dims, True, strides=[2, 2])
        if g.maybe(0.5):
            normalize(g, made)


def pool(g: Graph) -> None:
    """Largest or mean, windows that may stand over the edge."""
    v = g.any(_image)
    if v is None or min(min(d.sizes) for d in v.dims[2:]) < 2:
        return
    if g.maybe(0.3):
        g.add("GlobalAveragePool", [v.name], v.dtype, [*v.dims[:2], fixed(1), fixed(1)], v.loose)
        return
    op, pads = g.pick(["MaxPool", "AveragePool"]), g.pick([0, 1])
    dims = [*v.dims[:2], *(_out(d, 2, pads, pads, 1) for d in v.dims[2:])]
    more = {"count_include_pad": g.rnd.randrange(2)} if op == "AveragePool" else {}
    g.add(op, [v.name], v.dtype, dims, v.loose, kernel_shape=[2, 2], pads=[pads] * 4, **more)


def matmul(g: Graph) -> None:
    """With a weight, and often a bias; or two values."""
    v = g.any(lambda v: v.dtype in ("float32", "float64") and v.rank > 0 and v.dims[-1].fixed is not None)
    if v is None:
        return
    inner, out = v.dims[-1].sizes[0], g.pick([1, 2, 3])
    if inner > 16:
        return
    weight = np.asarray(g.rnd.choices([-1, -0.5, 0, 0.25, 1], k=inner * out), v.dtype).reshape(inner, out)
    if v.rank == 2 and g.maybe(0.4):
        turned = g.rnd.randrange(2)
        names = [v.name, g.constant(weight.T.copy() if turned else weight)]
        names += [g.constant(np.linspace(-1, 1, out, dtype=v.dtype))] if g.maybe(0.6) else []
        g.add("Gemm", names, v.dtype, [v.dims[0], fixed(out)], True, transB=turned, alpha=g.pick([1.0, 0.5]))
        return
    made = g.add("MatMul", [v.name, g.constant(weight)], v.dtype, [*v.dims[:-1], fixed(out)], True)
    if g.maybe(0.6):
        bias = g.constant(np.linspace(-1, 1, out, dtype=v.dtype))
        names = [made.name, bias]
        g.add("Add", names[::-1] if g.maybe(0.3) else names, v.dtype, made.dims, True)


def stack(g: Graph, widths: Sequence[int] = (4, 6, 8), layers: int = 2) -> None:
    """Layers with hidden values between them that nobody else reads, and weights that are no round numbers."""
    v = g.any(lambda v: v.dtype == "float32" and v.rank > 1 and v.dims[1].fixed is not None and v.elements < 100)
    if v is None or (v.rank != 4 and v.dims[-1].fixed is None):
        return
    rng = np.random.default_rng(g.rnd.randrange(2**32))
    hidden, axis = g.pick(widths), 1 if v.rank == 4 else -1
    for layer in range(layers):
        into, out = v.dims[axis].sizes[0], g.pick([2, 3]) if layer == layers - 1 else hidden
        dims = list(v.dims)
        dims[axis] = fixed(out)
        if v.rank == 4:
            pad = g.pick([0, 1])
            names = [v.name, g.constant(rng.normal(size=(out, into, 1 + 2 * pad, 1 + 2 * pad)).astype(np.float32))]
            names += [g.constant(rng.normal(size=out).astype(np.float32))] if g.maybe(0.5) else []
            v = g.add("Conv", names, v.dtype, dims, True, kernel_shape=[1 + 2 * pad] * 2, pads=[pad] * 4)
        else:
            v = g.add(
                "MatMul", [v.name, g.constant(rng.normal(size=(into, out)).astype(np.float32))], v.dtype, dims, True
            )
        if layer < layers - 1:
            g.values.remove(v)
            v = g.add(g.pick(["Relu", "Tanh", "Sigmoid", "Abs"]), [v.name], v.dtype, dims, True)
            g.values.remove(v)


def wide_stack(g: Graph) -> None:
    """With a weight that is large enough to be worth compressing."""
    stack(g, (32, 40), 3)


def layer_norm(g: Graph) -> None:
    """Over the last axis."""
    v = g.any(lambda v: v.dtype == "float32" and v.rank > 0 and v.dims[-1].fixed is not None)
    if v is not None and g.opset >= 17 and v.dims[-1].sizes[0] > 1:
        scale = g.constant(np.linspace(0.5, 1, v.dims[-1].sizes[0], dtype=np.float32))
        g.add("LayerNormalization", [v.name, scale], v.dtype, v.dims, True, epsilon=0.01)


def shape_chain(g: Graph) -> None:
    """Shape, a part of it, arithmetic, and something of that size."""
    v = g.any(lambda v: v.rank > 0)
    if v is None:
        return
    axis = g.rnd.randrange(v.rank)
    shape = g.add("Shape", [v.name], "int64", [fixed(v.rank)], False)
    one = g.add("Gather", [shape.name, ints(g, axis)], "int64", [fixed(1)], False)
    d = v.dims[axis]
    if max(d.sizes) > 40:
        return
    kind = g.rnd.randrange(3)
    if kind == 0:
        fill = helper.make_tensor("value", *g.pick([(TensorProto.FLOAT, [1], [2.5]), (TensorProto.INT64, [1], [3])]))
        dtype = "float32" if fill.data_type == TensorProto.FLOAT else "int64"
        g.add("ConstantOfShape", [one.name], dtype, [d], False, value=fill)
    elif kind == 1:
        scalar = g.add("Squeeze", [one.name, ints(g, 0)], "int64", [], False)
        zero, step = (g.constant(np.asarray(n, np.int64)) for n in (0, 1))
        g.add("Range", [zero, scalar.name, step], "int64", [d], False)
    else:
        more = g.add(g.pick(["Add", "Mul"]), [one.name, ints(g, 1)], "int64", [fixed(1)], False)
        g.add("Cast", [more.name], "float32", [fixed(1)], False, to=TensorProto.FLOAT)


def size(g: Graph) -> None:
    """How many elements."""
    v = g.any()
    if v is not None:
        g.add("Size", [v.name], "int64", [], False)


def cumsum(g: Graph) -> None:
    """Running sums."""
    v = g.any(lambda v: v.dtype in ("float32", "int64") and v.rank > 0)
    if v is not None:
        axis = g.constant(np.asarray(g.rnd.randrange(v.rank), np.int64))
        flags = {k: 1 for k in ("exclusive", "reverse") if g.maybe(0.3)}
        g.add("CumSum", [v.name, axis], v.dtype, v.dims, v.loose, **flags)


def topk(g: Graph) -> None:
    """The largest and where they are."""
    v = g.any(lambda v: v.dtype in ("float32", "int64") and v.rank > 0 and not v.loose)
    if v is not None:
        axis = g.rnd.randrange(v.rank)
        if min(v.dims[axis].sizes) > 1:
            dims = tuple(fixed(2) if a == axis else d for a, d in enumerate(v.dims))
            made = [Value(g.fresh("k"), v.dtype, dims), Value(g.fresh("l"), "int64", dims)]
            g.add_many("TopK", [v.name, ints(g, 2)], made, axis=axis)


def fake_quantized(g: Graph) -> None:
    """A weight through QuantizeLinear and DequantizeLinear, then used."""
    v = g.any(lambda v: v.dtype == "float32" and v.rank > 0 and v.dims[-1].fixed is not None)
    if v is not None:
        n = v.dims[-1].sizes[0]
        scale, zero = g.constant(np.float32(0.25)), g.constant(np.int8(g.pick([0, 3])))
        weight = g.constant(np.linspace(-2, 2, n, dtype=np.float32))
        whole = g.add("QuantizeLinear", [weight, scale, zero], "int8", [fixed(n)], False)
        back = g.add("DequantizeLinear", [whole.name, scale, zero], "float32", [fixed(n)], False)
        g.add(g.pick(["Mul", "Add"]), [v.name, back.name], "float32", v.dims, v.loose)


def if_(g: Graph) -> None:
    """A condition of the run or a constant; both bodies read what is outside, and use the same names."""
    v = g.any(lambda v: v.dtype in ("float32", "int64", "bool"))
    c = g.any(lambda v: v.dtype == "bool" and all(d.fixed == 1 for d in v.dims) and not v.loose)
    if v is None or g.depth > 1:
        return
    bodies, results = [], []
    for name in ("then", "else"):
        body = g.body("b_" if g.maybe(0.8) else f"{name}_")
        for _ in range(g.rnd.randrange(3)):
            body.grow()
        last = body.values[-1] if body.values[-1].name.startswith(body.prefix) else None
        if last is None or last.dtype != v.dtype or last.dims != v.dims or last not in body.values[len(g.values) :]:
            last = body.add(
                "Identity" if v.dtype == "bool" or g.maybe(0.3) else "Neg", [v.name], v.dtype, v.dims, v.loose
            )
        bodies.append(body.proto(name, [], [last]))
        results.append(last)
    condition = c.name if c is not None else g.constant(np.asarray(g.maybe(0.5)))
    g.add(
        "If", [condition], v.dtype, v.dims, any(r.loose for r in results), then_branch=bodies[0], else_branch=bodies[1]
    )


def loop(g: Graph) -> None:
    """A few times, with a state, a captured value, and what each round gives."""
    v = g.any(lambda v: v.dtype in ("float32", "int64"))
    if v is None or g.depth > 0:
        return
    times = g.pick([1, 2, 3])
    state = Value(f"{g.prefix}loop_state", v.dtype, v.dims, v.loose)
    counter, going = Value(f"{g.prefix}loop_i", "int64", ()), Value(f"{g.prefix}loop_c", "bool", ())
    body = g.body("b_", [state])
    for _ in range(g.rnd.randrange(2)):
        body.grow()
    other = body.any(lambda o: o.dtype == v.dtype and growing.broadcast(state, o) == state.dims)
    added = body.add("Add", [state.name, (other or state).name], v.dtype, v.dims, True)
    after = body.add("Identity", [going.name], "bool", (), False)
    loose = v.loose or v.dtype == "float32"
    inner = body.proto("body", [counter, going, state], [after, added])
    for value, old in zip(inner.input, (counter, going, state), strict=True):
        value.CopyFrom(info(old, shape=not old.rank))
    count, true = g.constant(np.asarray(times, np.int64)), g.constant(np.asarray(True))
    g.add("Loop", [count, true, v.name], v.dtype, v.dims, loose, body=inner)


GROWN = (
    *(growing.unary, growing.unary, growing.clip, growing.with_constant, growing.with_constant, growing.binary),
    *(growing.where, growing.cast, growing.transpose, growing.transpose, growing.reshape, growing.reshape),
    *(growing.flatten, growing.squeeze, growing.unsqueeze, growing.slice_, growing.concat, growing.split, growing.pad),
    *(growing.gather, growing.expand, growing.tile, growing.reduce, growing.arg, growing.softmax),
    *(conv, conv, normalize, conv_transpose, pool, matmul, matmul, layer_norm, shape_chain, size, cumsum, topk),
    *(fake_quantized, if_, loop),
)
"""What a graph grows by; twice what matters more."""

LAYERED = (
    *(grower for grower in GROWN if grower is not fake_quantized),
    *(conv, matmul, stack, stack, growing.unary) * 4,
)
"""The same with many layers in it, none quantized already."""

WIDE = (*LAYERED, *(wide_stack,) * 8)


@dataclass
class Made:
    """A model, inputs for it at both sizes, and which outputs may move by rounding."""

    model: onnx.ModelProto
    feeds: list[dict[str, np.ndarray]]
    loose: frozenset[str]
    overridable: dict[str, np.ndarray]


def make(rnd: random.Random, nodes: int = 14, growers: Sequence[Callable[[Graph], None]] = GROWN) -> Made:
    """A model of about so many nodes."""
    graph = Graph(rnd, rnd.choice([13, 17, 21]), growers)
    axes = [Dim((SIZES[0][n], SIZES[1][n]), n) for n in ("N", "T")]
    inputs = [Value("x", "float32", (axes[0], fixed(2), axes[1], fixed(4)))]
    for name in ("y", "z", "w")[: rnd.randrange(4)]:
        dims = tuple(
            rnd.choice([axes[0], axes[1], fixed(1), fixed(2), fixed(3), fixed(4)]) for _ in range(rnd.randrange(4))
        )
        inputs.append(Value(name, rnd.choice(FLOATS[:2] + FLOATS + OTHERS), dims))
    inputs = [Value(v.name, v.dtype, v.dims, v.dtype == "float16") for v in inputs]
    graph.values = list(inputs)
    for _ in range(rnd.randrange(2, nodes + 1)):
        graph.grow()
    made = graph.values[len(inputs) :] or [graph.add("Neg", ["x"], "float32", inputs[0].dims, False)]
    read = {n for node in graph.nodes for n in node.input}
    ends = [v for v in made if v.name not in read and rnd.random() < 0.7]
    outputs = ends + [v for v in made if v not in ends and rnd.random() < 0.1] or made[-1:]
    if rnd.random() < 0.08:
        outputs.append(rnd.choice(inputs))
    rnd.shuffle(outputs)
    overridable = [n for n, a in graph.weights.items() if a.dtype.kind == "f" and a.size > 1 and rnd.random() < 0.15]
    proto = graph.proto("fuzz", inputs, outputs, overridable)
    version = 10 if graph.opset == 21 else 8
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=version)
    feeds = [{v.name: _numbers(v, i) for v in inputs} for i in (0, 1)]
    changed = {n: (graph.weights[n] * 1.5).astype(graph.weights[n].dtype) for n in overridable}
    return Made(model, feeds, frozenset(v.name for v in outputs if v.loose), changed)


def _numbers(value: Value, run: int) -> np.ndarray:
    shape = tuple(d.sizes[run] for d in value.dims)
    rng = np.random.default_rng([run, *value.name.encode()])
    if value.dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if value.dtype not in FLOATS:
        return rng.integers(0 if value.dtype == "uint8" else -5, 6, shape).astype(value.dtype)
    made = rng.normal(size=shape)
    flat = made.reshape(-1)
    flat[: flat.size // 4] = np.round(flat[: flat.size // 4])
    return np.asarray(made.astype(value.dtype))


def graphs() -> Any:
    """A hypothesis strategy of :class:`Made`."""
    from hypothesis import strategies as st

    return st.randoms(use_true_random=False).map(make)
