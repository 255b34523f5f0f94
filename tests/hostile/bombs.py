"""A few hundred bytes that ask for gigabytes, or for hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import builders
import numpy as np
import onnx
from builders import value, weight
from onnx import TensorProto, helper

from hostile.corpus import OK, REFUSED, Group

KINDS = Group("bomb")
node = helper.make_node
SUM = node("ReduceSum", ["big"], ["y"], keepdims=0)


def bomb(*nodes: onnx.NodeProto, weights: Sequence[onnx.TensorProto] = (), inputs: Any = None) -> Any:
    """``nodes`` make ``big`` of x and weights; y is its sum."""

    def make(_folder: object, _rng: object) -> onnx.ModelProto:
        given = inputs if inputs is not None else [value("x")]
        tail = [] if any("y" in n.output for n in nodes) else [SUM]
        return builders.model([*nodes, *tail], given, [value("y", None)], list(weights))

    return make


def ints(name: str, *numbers: int) -> onnx.TensorProto:
    return weight(name, list(numbers), np.int64)


def scalar(name: str, number: float, dtype: Any = np.int64) -> onnx.TensorProto:
    return weight(name, number, dtype)


HUGE = ints("shape", 100_000, 100_000)
SCALED = node("Mul", ["first", "one"], ["big"])
ONE = weight("one", [1, 1])

for name, make in {
    "constant-of-shape": bomb(node("ConstantOfShape", ["shape"], ["big"]), weights=[HUGE]),
    "constant-of-shape-2-62": bomb(node("ConstantOfShape", ["shape"], ["big"]), weights=[ints("shape", 2**31, 2**31)]),
    "constant-of-shape-int8": bomb(
        node("ConstantOfShape", ["shape"], ["b"], value=helper.make_tensor("v", TensorProto.INT8, [1], [3])),
        node("Cast", ["b"], ["big"], to=1),
        weights=[HUGE],
    ),
    "expand": bomb(node("Expand", ["x", "shape"], ["big"]), weights=[ints("shape", 5_000_000_000, 2)]),
    "tile": bomb(node("Tile", ["x", "times"], ["big"]), weights=[ints("times", 10**10)]),
    "range": bomb(
        node("Range", ["from", "to", "step"], ["r"]),
        node("Cast", ["r"], ["big"], to=1),
        weights=[scalar("from", 0), scalar("to", 10**10), scalar("step", 1)],
    ),
    "range-of-floats": bomb(
        node("Range", ["from", "to", "step"], ["big"]),
        weights=[scalar(n, v, np.float32) for n, v in (("from", 0), ("to", 1e10), ("step", 1))],
    ),
    "pad": bomb(node("Pad", ["x", "pads"], ["big"]), weights=[ints("pads", 10**10, 10**10)]),
    "one-hot": bomb(
        node("Cast", ["x"], ["i"], to=7),
        node("OneHot", ["i", "depth", "values"], ["big"]),
        weights=[scalar("depth", 10**10), weight("values", [0, 1])],
    ),
    "resize": bomb(
        node("Resize", ["x", "", "scales"], ["big"]),
        weights=[weight("scales", [1, 1, 60_000, 60_000])],
        inputs=[value("x", (1, 1, 2, 2))],
    ),
    "random-normal": bomb(
        node("RandomNormal", [], ["r"], shape=[100_000, 100_000]),
        node("Add", ["r", "x"], ["big"]),
        inputs=[value("x", (1,))],
    ),
    "outer-product": bomb(
        node("Reshape", ["w", "column"], ["c"]),
        node("Mul", ["w", "c"], ["o"]),
        node("Mul", ["o", "x"], ["big"]),
        weights=[weight("w", np.ones(200_000)), ints("column", -1, 1)],
        inputs=[value("x", (1,))],
    ),
    "matmul-outer": bomb(
        node("Expand", ["x", "tall"], ["a"]),
        node("Expand", ["x", "wide"], ["b"]),
        node("MatMul", ["a", "b"], ["big"]),
        weights=[ints("tall", 1_000_000, 1), ints("wide", 1, 1_000_000)],
        inputs=[value("x", (1, 1))],
    ),
    "conv-of-huge-pads": bomb(
        node("Conv", ["x", "w"], ["big"], pads=[100_000] * 4),
        weights=[weight("w", np.ones((1, 1, 1, 1)))],
        inputs=[value("x", (1, 1, 2, 2))],
    ),
    "conv-transpose-stride": bomb(
        node("ConvTranspose", ["x", "w"], ["big"], strides=[100_000, 100_000]),
        weights=[weight("w", np.ones((1, 1, 1, 1)))],
        inputs=[value("x", (1, 1, 3, 3))],
    ),
    "einsum": bomb(
        node("Einsum", ["x"] * 11, ["big"], equation=",".join("abcdefghijk") + "->abcdefghijk"),
        inputs=[value("x", (10,))],
    ),
    "gather-again-and-again": bomb(
        *(node("Gather", [before, "rows"], [after], axis=-1) for before, after in ("xa", "ab", "bc")),
        node("Gather", ["c", "rows"], ["big"], axis=-1),
        weights=[weight("rows", np.zeros((300, 1)), np.int64)],
        inputs=[value("x", (1,))],
    ),
    "eye-like": bomb(node("ConstantOfShape", ["shape"], ["z"]), node("EyeLike", ["z"], ["big"]), weights=[HUGE]),
    "list-that-comes-in": bomb(node("Add", ["x", "x"], ["big"]), inputs=[value("x", (2**40,))]),
    "list-then-add": bomb(
        node("ConstantOfShape", ["shape"], ["b"]), node("Add", ["b", "x"], ["big"]), weights=[ints("shape", 10**11)]
    ),
    "list-tiled-then-multiplied": bomb(
        node("Tile", ["x", "times"], ["t"]), node("Mul", ["t", "t"], ["big"]), weights=[ints("times", 10**10)]
    ),
    "list-made-on-the-way-then-added": bomb(
        node("Mul", ["side", "side"], ["area"]),
        node("ConstantOfShape", ["area"], ["b"]),
        node("Add", ["b", "x"], ["big"]),
        weights=[ints("side", 300_000)],
    ),
    "shape-made-on-the-way": bomb(
        node("Mul", ["side", "side"], ["area"]),
        node("ConstantOfShape", ["area"], ["big"]),
        weights=[ints("side", 200_000)],
    ),
    "shape-from-a-cast": bomb(
        node("Pow", ["two", "forty"], ["f"]),
        node("Cast", ["f"], ["shape"], to=7),
        node("ConstantOfShape", ["shape"], ["big"]),
        weights=[weight("two", [2]), weight("forty", [36])],
    ),
    "many-of-half-a-gigabyte": bomb(
        *(node("ConstantOfShape", ["shape"], [f"b{i}"], name=f"c{i}") for i in range(200)),
        node("Sum", [f"b{i}" for i in range(200)], ["big"]),
        weights=[ints("shape", 125_000_000)],
    ),
}.items():
    KINDS.add(name, REFUSED, make)


def doubling(times: int, axis: int = 0) -> Any:
    chain = [node("Concat", [f"d{i}" if i else "x"] * 2, [f"d{i + 1}"], axis=axis) for i in range(times)]
    return bomb(*chain[:-1], node("Concat", chain[-1].input, ["big"], axis=axis))


KINDS.add(
    "range-of-a-product",
    REFUSED,
    bomb(
        node("Mul", ["many", "many"], ["to"]),
        node("Range", ["from", "to", "step"], ["r"]),
        node("Cast", ["r"], ["big"], to=1),
        weights=[scalar("from", 0), scalar("many", 100_000), scalar("step", 1)],
    ),
)
KINDS.add(
    "list-as-long-as-its-type-says",  # onnx's inference would write out every number of it
    REFUSED,
    bomb(
        node("Add", ["x", "x"], ["twice"]),
        node("Cast", ["twice"], ["big"], to=1),
        inputs=[value("x", (2**33,), TensorProto.INT64)],
    ),
)
KINDS.add("concat-doubling", REFUSED, doubling(40))
KINDS.add("concat-doubling-a-little", OK, doubling(8))


@KINDS.kind("concat-doubling-a-shape", REFUSED)
def _shapes(_folder: object, _rng: object) -> onnx.ModelProto:
    """What is doubled is a list of dims, which shape inference carries along in full."""
    chain = [node("Shape", ["x"], ["d0"])]
    chain += [node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], axis=0) for i in range(40)]
    chain += [node("Cast", ["d40"], ["big"], to=1)]
    return bomb(*chain)(None, None)


@KINDS.kind("concat-doubling-a-constant", REFUSED)
def _constants(_folder: object, _rng: object) -> onnx.ModelProto:
    chain = [node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], axis=0) for i in range(40)]
    chain += [node("Cast", ["d40"], ["big"], to=1)]
    return bomb(*chain, weights=[ints("d0", 1, 2)])(None, None)


def adding(times: int) -> list[onnx.NodeProto]:
    return [node("Add", [f"a{i}" if i else "x"] * 2, [f"a{i + 1}"]) for i in range(times)]


KINDS.add("add-to-itself-2000-times", OK, bomb(*adding(2000), node("Relu", ["a2000"], ["big"])))

# Loops


def loop(trips: Any, *steps: onnx.NodeProto, condition: str = "c", carried: str = "x", shape: Any = None) -> Any:
    """Loop over ``steps``, which make s2 of s; ``trips`` None: no limit, a number, or a name of a value."""
    inputs = [value("i", (), TensorProto.INT64), value("c", (), TensorProto.BOOL), value("s", shape)]
    outputs = [value("c2", (), TensorProto.BOOL), value("s2", shape)]
    inner = helper.make_graph([node("Identity", [condition], ["c2"]), *steps], "body", inputs, outputs)
    name = "" if trips is None else "trips"
    weights = [weight("true", True, np.bool_), *([scalar("trips", trips)] if isinstance(trips, int) else [])]
    return bomb(node("Loop", [name, "true", carried], ["big"], body=inner), weights=weights)


STILL = node("Relu", ["s"], ["s2"])
KINDS.add("loop-of-2-60-trips", REFUSED, loop(2**60, STILL))
KINDS.add("loop-of-1000-trips", OK, loop(1000, STILL))
KINDS.add("loop-of-300-thousand-trips", OK, loop(300_000, STILL))
KINDS.add("loop-of-5-million-trips", REFUSED, loop(5_000_000, STILL), says="loops run")
KINDS.add("loop-without-end", REFUSED, loop(None, STILL, condition="true"))
KINDS.add("loop-that-doubles", REFUSED, loop(50, node("Concat", ["s", "s"], ["s2"], axis=0)))
KINDS.add("loop-that-doubles-without-end", REFUSED, loop(None, node("Concat", ["s", "s"], ["s2"], axis=0)))


@KINDS.kind("loop-of-trips-made-on-the-way", REFUSED)
def _made(_folder: object, _rng: object) -> onnx.ModelProto:
    proto = loop("trips", STILL)(None, None)
    proto.graph.initializer.extend([weight("two", 2.0), weight("sixty", 60.0)])
    nodes = [node("Pow", ["two", "sixty"], ["p"]), node("Cast", ["p"], ["trips"], to=7), *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


@KINDS.kind("loop-in-loop-in-loop", REFUSED)
def _nested(_folder: object, _rng: object) -> onnx.ModelProto:
    """A thousand trips each, six deep."""
    step = [node("Relu", ["s"], ["s2"])]
    for level in range(6):
        inputs = [value("i", (), TensorProto.INT64), value("c", (), TensorProto.BOOL), value("s")]
        outputs = [value("c2", (), TensorProto.BOOL), value("s2")]
        inner = helper.make_graph([node("Identity", ["c"], ["c2"]), *step], f"body{level}", inputs, outputs)
        step = [node("Loop", ["trips", "true", "s"], ["s2"], body=inner)]
    outer = node("Loop", ["trips", "true", "x"], ["big"], body=step[0].attribute[0].g)
    return bomb(outer, weights=[weight("true", True, np.bool_), scalar("trips", 1000)])(None, None)


@KINDS.kind("loop-that-collects", REFUSED, says="would take at least")
def _collects(_folder: object, _rng: object) -> onnx.ModelProto:
    """Every trip's value is kept: a scan output."""
    inputs = [value("i", (), TensorProto.INT64), value("c", (), TensorProto.BOOL)]
    outputs = [value("c2", (), TensorProto.BOOL), value("s2", (1_000_000,))]
    steps = [node("Identity", ["c"], ["c2"]), node("ConstantOfShape", ["shape"], ["s2"])]
    inner = helper.make_graph(steps, "body", inputs, outputs)
    weights = [weight("true", True, np.bool_), scalar("trips", 100_000), ints("shape", 1_000_000)]
    return bomb(node("Loop", ["trips", "true"], ["big"], body=inner), weights=weights)(None, None)


@KINDS.kind("in-a-branch", REFUSED)
def _branch(_folder: object, _rng: object) -> onnx.ModelProto:
    make = [node("ConstantOfShape", ["shape"], ["b"]), node("ReduceSum", ["b"], ["t"], keepdims=0)]
    then = helper.make_graph(make, "then", [], [value("t", ())])
    other = helper.make_graph([node("ReduceSum", ["x"], ["e"], keepdims=0)], "else", [], [value("e", ())])
    proto = bomb(node("If", ["c"], ["y"], then_branch=then, else_branch=other), weights=[HUGE])(None, None)
    proto.graph.input.append(value("c", (), TensorProto.BOOL))
    return proto


@KINDS.kind("in-a-function", REFUSED)
def _function(_folder: object, _rng: object) -> onnx.ModelProto:
    steps = [
        helper.make_node("Constant", [], ["shape"], value=ints("shape", 100_000, 100_000)),
        node("ConstantOfShape", ["shape"], ["z"]),
        node("ReduceSum", ["z"], ["r"], keepdims=0),
        node("Add", ["a", "r"], ["b"]),
    ]
    function = helper.make_function("f", "Boom", ["a"], ["b"], steps, [helper.make_opsetid("", builders.OPSET)])
    call = node("Boom", ["x"], ["y"], domain="f")
    return builders.model([call], [value("x")], [value("y", None)], domains=["f"], functions=[function])


@KINDS.kind("sequence-that-grows", REFUSED)
def _sequence(_folder: object, _rng: object) -> onnx.ModelProto:
    """A Loop inserts a megabyte into a sequence, 100,000 times."""
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    inputs = [value("i", (), TensorProto.INT64), value("c", (), TensorProto.BOOL), helper.make_value_info("s", kind)]
    outputs = [value("c2", (), TensorProto.BOOL), helper.make_value_info("s2", kind)]
    steps = [
        node("Identity", ["c"], ["c2"]),
        node("ConstantOfShape", ["shape"], ["z"]),
        node("SequenceInsert", ["s", "z"], ["s2"]),
    ]
    inner = helper.make_graph(steps, "body", inputs, outputs)
    nodes = [
        node("SequenceEmpty", [], ["empty"]),
        node("Loop", ["trips", "true", "empty"], ["all"], body=inner),
        node("SequenceLength", ["all"], ["n"]),
        node("Cast", ["n"], ["f"], to=1),
        node("Add", ["f", "x"], ["y"]),
    ]
    weights = [weight("true", True, np.bool_), scalar("trips", 100_000), ints("shape", 250_000)]
    return builders.model(nodes, [value("x")], [value("y", None)], weights)


@KINDS.kind("size-from-the-input", OK)
def _from_input(_folder: object, _rng: object) -> onnx.ModelProto:
    """Legal, and harmless until somebody feeds it a large number; no number of ours may be."""
    nodes = [node("ConstantOfShape", ["n"], ["z"]), node("ReduceSum", ["z"], ["r"], keepdims=0)]
    return builders.model(
        [*nodes, node("Add", ["r", "x"], ["y"])], [value("x"), value("n", (3,), TensorProto.INT64)], [value("y")]
    )
