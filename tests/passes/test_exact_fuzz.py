"""Random graphs through the exact passes, one by one and in a row: the same bits, where nothing is fused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from support import build, node, run

from graphopt import registry
from graphopt.base import Context
from graphopt.errors import RuntimeFailure
from graphopt.manager import PassManager
from graphopt.model import load, to_bytes, to_proto

BITS = (
    *("eliminate-identities", "merge-reshapes", "eliminate-duplicates", "deduplicate-weights", "inline-if"),
    *("constants-to-initializers", "fold-qdq-weights", "fold-shapes", "merge-slices"),
)
SHAPE = (2, 1, 3, 4)


class Grower:
    """Adds one random node after another; knows each value's shape, with the first dim dynamic."""

    def __init__(self, draw: Any, prefix: str = "", values: dict[str, tuple[int, ...]] | None = None) -> None:
        self.draw = draw
        self.prefix = prefix
        self.values = dict(values or {"x": SHAPE})
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def constant(self, array: Any) -> str:
        name = f"{self.prefix}k{len(self.weights)}"
        if self.draw(st.booleans()):
            self.weights[name] = np.asarray(array)
        else:
            tensor = onnx.numpy_helper.from_array(np.asarray(array))
            self.weights[name] = np.zeros(0, np.float32)  # a place holder, so that names go on
            self.nodes.append(node("Constant", [], f"{name}c", value=tensor))
            return f"{name}c"
        return name

    def make(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> None:
        name = f"{self.prefix}v{len(self.nodes)}"
        self.nodes.append(node(op, inputs, name, **attributes))
        self.values[name] = shape

    def grow(self, depth: int = 0) -> None:
        source = self.pick(self.values)
        shape = self.values[source]
        kinds = ["same", "same", "arithmetic", "reshape", "transpose", "squeeze", "unsqueeze", "cast", "weight"]
        kinds += ["slice", "slice", "sized", "sized"]
        kind = self.pick([*kinds, "if"] if depth == 0 else kinds)
        getattr(self, f"_{kind}")(source, shape)

    def _same(self, source: str, shape: tuple[int, ...]) -> None:
        op = self.pick(["Identity", "Neg", "Abs", "Relu", "Dropout", "Sum", "Flatten", "Pad", "Slice"])
        if op == "Flatten":
            self.make(op, [source], (shape[0] if shape else 1, int(np.prod(shape[1:]))), axis=min(1, len(shape)))
        elif op == "Pad":
            self.make(op, [source, self.constant(np.zeros(2 * len(shape), np.int64))], shape)
        elif op == "Slice" and shape:
            ends = self.pick([2**40, shape[-1]])
            bounds = [self.constant(np.array([b], np.int64)) for b in (0, ends, -1)]
            self.make(op, [source, *bounds], shape)
        else:
            self.make("Neg" if op == "Slice" else op, [source], shape)

    def _arithmetic(self, source: str, shape: tuple[int, ...]) -> None:
        op = self.pick(["Add", "Sub", "Mul", "Div", "Pow"])
        value = self.pick([0.0, -0.0, 1.0, 2.0]) if op in ("Add", "Sub", "Mul") else 1.0
        extra = self.pick([(), (1,), (1,) * (len(shape) + 1), shape[-1:]])
        result = np.broadcast_shapes(shape, extra)
        inputs = [source, self.constant(np.full(extra, value, np.float32))]
        self.make(op, inputs[::-1] if op in ("Add", "Mul") and self.draw(st.booleans()) else inputs, result)

    def _reshape(self, source: str, shape: tuple[int, ...]) -> None:
        count = int(np.prod(shape))
        targets = [shape, (-1,), (count,), (shape[0] if shape else 1, -1), (*shape, 1), (1, *shape[1:], *shape[:1])]
        target = self.pick([t for t in targets if 0 not in t])
        given = [
            0 if i < len(shape) and d == shape[i] and self.draw(st.booleans()) else d for i, d in enumerate(target)
        ]
        known = int(np.prod([d for d in target if d != -1]))
        self.make(
            "Reshape",
            [source, self.constant(np.array(given, np.int64))],
            tuple(count // known if d == -1 else d for d in target),
        )

    def _transpose(self, source: str, shape: tuple[int, ...]) -> None:
        perm = self.draw(st.permutations(range(len(shape))))
        attributes = {} if list(perm) == list(reversed(range(len(shape)))) else {"perm": perm}
        self.make("Transpose", [source], tuple(shape[a] for a in perm), **attributes)

    def _squeeze(self, source: str, shape: tuple[int, ...]) -> None:
        ones = [a for a, d in enumerate(shape) if d == 1]
        if ones:
            axis = self.pick(ones)
            spelled = self.pick([axis, axis - len(shape)])
            left = tuple(d for a, d in enumerate(shape) if a != axis)
            self.make("Squeeze", [source, self.constant(np.array([spelled], np.int64))], left)

    def _unsqueeze(self, source: str, shape: tuple[int, ...]) -> None:
        if len(shape) > 4:
            return
        axis = self.draw(st.integers(0, len(shape)))
        wide = (*shape[:axis], 1, *shape[axis:])
        spelled = self.pick([axis, axis - len(wide)])
        self.make("Unsqueeze", [source, self.constant(np.array([spelled], np.int64))], wide)

    def _cast(self, source: str, shape: tuple[int, ...]) -> None:
        # Not through double: ONNX Runtime takes float -> double -> float out of a graph itself, its optimizations off
        # or not, and then cannot run a body that reads the result.
        through = self.pick([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32])
        name = f"{self.prefix}t{len(self.nodes)}"
        self.nodes.append(node("Cast", [source], name, to=through))
        self.make("Cast", [name], shape, to=TensorProto.FLOAT)

    def _slice(self, source: str, shape: tuple[int, ...]) -> None:
        if not shape:
            return
        axis = self.draw(st.integers(0, len(shape) - 1))
        numbers = st.integers(-shape[axis], shape[axis] + 1)
        start, end, step = self.draw(numbers), self.draw(numbers | st.just(2**62)), self.pick([1, 1, 2])
        length = len(range(shape[axis])[start:end:step])
        if length:
            spelled = self.pick([axis, axis - len(shape)])
            parts = [self.constant(np.array([number], np.int64)) for number in (start, end, spelled, step)]
            self.make("Slice", [source, *parts], (*shape[:axis], length, *shape[axis + 1 :]))

    def _sized(self, source: str, shape: tuple[int, ...]) -> None:
        """To a shape that is computed: of its own dims, in another order, two of them multiplied, one left open."""
        if len(shape) < 2:
            return
        base = f"{self.prefix}z{len(self.nodes)}"
        self.nodes.append(node("Shape", [source], base))
        order = self.pick([range(len(shape)), self.draw(st.permutations(range(len(shape))))])
        parts, target = [], []
        for axis in order:
            parts.append(f"{base}d{axis}")
            self.nodes.append(node("Gather", [base, self.constant(np.array([axis], np.int64))], parts[-1]))
            target.append(shape[axis])
        if self.draw(st.booleans()):
            self.nodes.append(node("Mul", parts[:2], f"{base}p"))
            parts, target = [f"{base}p", *parts[2:]], [target[0] * target[1], *target[2:]]
        elif self.draw(st.booleans()):
            parts[self.draw(st.integers(0, len(parts) - 1))] = self.constant(np.array([-1], np.int64))
        self.nodes.append(node("Concat", parts, f"{base}t", axis=0))
        op = "Expand" if tuple(target) == shape and f"{base}p" not in parts and self.draw(st.booleans()) else "Reshape"
        self.make(op if not any("k" in part for part in parts) else "Reshape", [source, f"{base}t"], tuple(target))

    def _weight(self, source: str, shape: tuple[int, ...]) -> None:
        weight = self.constant(np.full((3,), self.pick([0.5, 1.5]), np.float32))
        scale, zero = self.constant(np.float32(0.25)), self.constant(np.int8(self.pick([0, 3])))
        base = f"{self.prefix}q{len(self.nodes)}"
        self.nodes.append(node("QuantizeLinear", [weight, scale, zero], base))
        self.nodes.append(node("DequantizeLinear", [base, scale, zero], f"{base}d"))
        total = f"{base}s"
        self.nodes.append(node("ReduceSum", [f"{base}d"], total, keepdims=0))
        self.make("Mul", [source, total], shape)

    def _if(self, source: str, shape: tuple[int, ...]) -> None:
        del shape
        bodies = []
        for branch in ("p", "r"):
            inner = Grower(self.draw, f"{self.prefix}{branch}{len(self.nodes)}", {source: self.values[source]})
            for _ in range(self.draw(st.integers(1, 3))):
                inner.grow(depth=1)
            last = list(inner.values)[-1]
            inner.make("Reshape", [last, inner.constant(np.array([-1], np.int64))], ())
            inner.make("ReduceSum", [list(inner.values)[-1]], (), keepdims=0)
            result = helper.make_tensor_value_info(list(inner.values)[-1], TensorProto.FLOAT, None)
            tensors = [onnx.numpy_helper.from_array(a, n) for n, a in inner.weights.items()]
            bodies.append(helper.make_graph(inner.nodes, "b", [], [result], tensors))
        condition = self.constant(np.bool_(self.draw(st.booleans()))) if self.draw(st.booleans()) else "go"
        self.make("If", [condition], (), then_branch=bodies[0], else_branch=bodies[1])


@st.composite
def graphs(draw: Any) -> onnx.ModelProto:
    """A model of up to a dozen nodes with one or two outputs."""
    grower = Grower(draw)
    for _ in range(draw(st.integers(2, 12))):
        grower.grow()
    made = [v for v in grower.values if v != "x"]
    if not made:
        grower.make("Neg", ["x"], SHAPE)
        made = list(grower.values)[1:]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    dims = [draw(st.sampled_from([size, f"d{axis}"])) for axis, size in enumerate(SHAPE)]
    proto = build(grower.nodes, {"x": dims}, outputs, grower.weights)
    proto.graph.input.append(helper.make_tensor_value_info("go", TensorProto.BOOL, []))
    return proto


def results(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    x.reshape(-1)[:6] = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-42]
    return [run(proto, {"x": x, "go": np.array(go)}) for go in (True, False)]


def optimized(proto: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    model = load(proto)
    done = PassManager([registry.create(n, {}) for n in names], verify="off").run(model, Context(original=model))
    assert not done.reverted, done.reverted[0].reason
    return to_proto(done.model)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(graphs())
def test_random_graphs_keep_every_bit(proto: onnx.ModelProto) -> None:
    try:
        before = results(proto)
    except RuntimeFailure:  # a Pow of something, say, that this runtime lacks
        return
    for names in (*((name,) for name in BITS), BITS):
        after = optimized(proto, names)
        for expected, got in zip(before, results(after), strict=True):
            for name, array in expected.items():
                same = array.shape == got[name].shape and array.tobytes() == got[name].tobytes()
                assert same, f"{names}: {name}\n{onnx.printer.to_text(proto)}\n{onnx.printer.to_text(after)}"
        again = optimized(after, names)
        if len(names) == 1:
            assert to_bytes(load(again)) == to_bytes(load(after)), (names, onnx.printer.to_text(after))
