"""Graphs that are no graphs: cycles, names from nowhere, misused operators; and extreme ones that are fine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import builders
import numpy as np
import onnx
from builders import value, weight
from onnx import AttributeProto, TensorProto, helper

from hostile.corpus import ANY, OK, REFUSED, UNRUN, Group

KINDS = Group("graph")
node = helper.make_node


def made(*nodes: onnx.NodeProto, **more: Any) -> onnx.ModelProto:
    """x -> ``nodes`` -> y, two floats each."""
    return builders.model(nodes, [value("x")], [value("y")], **more)


def changed(change: Callable[[onnx.ModelProto], Any], of: Callable[[], onnx.ModelProto] = builders.relu) -> Any:
    def make(_folder: object, _rng: object) -> onnx.ModelProto:
        proto = of()
        change(proto)
        return proto

    return make


def graph(*nodes: onnx.NodeProto, **more: Any) -> Any:
    return lambda _folder, _rng: made(*nodes, **more)


# The model around the graph

for name, outcome, change in (
    ("no-opset", REFUSED, lambda p: p.ClearField("opset_import")),
    ("opset-twice", REFUSED, lambda p: p.opset_import.add(domain="", version=1)),
    ("opset-under-both-names", ANY, lambda p: p.opset_import.add(domain="ai.onnx", version=7)),
    ("opset-0", UNRUN, lambda p: setattr(p.opset_import[0], "version", 0)),
    ("opset-negative", UNRUN, lambda p: setattr(p.opset_import[0], "version", -5)),
    ("opset-future", UNRUN, lambda p: setattr(p.opset_import[0], "version", 99)),
    ("opset-2-63", UNRUN, lambda p: setattr(p.opset_import[0], "version", 2**63 - 1)),
    ("opsets-1000", OK, lambda p: p.opset_import.extend(helper.make_opsetid(f"d{i}", 1) for i in range(1000))),
    ("ir-version-0", REFUSED, lambda p: setattr(p, "ir_version", 0)),
    ("ir-version-missing", REFUSED, lambda p: p.ClearField("ir_version")),
    ("ir-version-negative", REFUSED, lambda p: setattr(p, "ir_version", -1)),
    ("ir-version-huge", UNRUN, lambda p: setattr(p, "ir_version", 2**62)),
    ("no-graph", REFUSED, lambda p: p.ClearField("graph")),
    ("no-node", REFUSED, lambda p: p.graph.ClearField("node")),
    ("no-output", REFUSED, lambda p: p.graph.ClearField("output")),
    ("nothing-at-all", REFUSED, lambda p: [p.graph.ClearField(f) for f in ("node", "input", "output")]),
    ("input-untyped", ANY, lambda p: p.graph.input[0].ClearField("type")),
    ("output-untyped", ANY, lambda p: p.graph.output[0].ClearField("type")),
    ("input-unlisted", REFUSED, lambda p: p.graph.ClearField("input")),
    ("input-twice", REFUSED, lambda p: p.graph.input.append(p.graph.input[0])),
    ("output-twice", REFUSED, lambda p: p.graph.output.append(p.graph.output[0])),
    ("input-unnamed", REFUSED, lambda p: p.graph.input.add()),
    ("output-unnamed", REFUSED, lambda p: p.graph.output.add()),
    ("output-from-nowhere", REFUSED, lambda p: p.graph.output.append(value("ghost"))),
    ("unused-inputs-500", OK, lambda p: p.graph.input.extend(value(f"u{i}") for i in range(500))),
    ("node-without-operator", REFUSED, lambda p: p.graph.node[0].ClearField("op_type")),
    ("value-info-of-nothing", OK, lambda p: p.graph.value_info.append(value("ghost"))),
    ("value-info-twice", OK, lambda p: p.graph.value_info.extend([value("y"), value("y")])),
    ("annotation-of-nothing", OK, lambda p: p.graph.quantization_annotation.add(tensor_name="ghost")),
    ("annotation-that-says-nothing", OK, lambda p: p.graph.quantization_annotation.add(tensor_name="x")),
    ("training-info-empty", OK, lambda p: p.training_info.add()),
):
    KINDS.add(name, outcome, changed(change))

# How nodes hang together

RELU, NEG = node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])
for name, outcome, make in (
    ("cycle-of-1", REFUSED, graph(node("Add", ["x", "y"], ["y"]))),
    ("cycle-of-2", REFUSED, graph(node("Relu", ["b"], ["y"]), node("Relu", ["y"], ["b"]))),
    (
        "cycle-of-5000",
        REFUSED,
        graph(*(node("Add", ["x", f"v{(i + 1) % 5000}"], [f"v{i}"]) for i in range(5000)), node("Neg", ["v0"], ["y"])),
    ),
    ("reads-from-nowhere", REFUSED, graph(node("Relu", ["ghost"], ["y"]))),
    ("made-twice", REFUSED, graph(RELU, NEG)),
    ("made-twice-by-one", REFUSED, graph(node("Split", ["x"], ["y", "y"], num_outputs=2))),
    ("makes-its-input", REFUSED, graph(node("Relu", ["x"], ["x"]), NEG)),
    ("unsorted", OK, graph(node("Neg", ["h"], ["y"]), node("Relu", ["x"], ["h"]))),
    (
        "no-inputs-at-all",
        ANY,
        lambda _f, _r: builders.model([node("Relu", ["w"], ["y"])], [], [value("y")], [weight("w", [1, -1])]),
    ),
    ("straight-through", ANY, lambda _f, _r: builders.model([node("Relu", ["x"], ["h"])], [value("x")], [value("x")])),
    ("unknown-operator", UNRUN, graph(node("NoSuchOp", ["x"], ["y"]))),
    ("unknown-domain", UNRUN, graph(node("Mystery", ["x"], ["y"], domain="com.example"))),
    ("undeclared-domain", UNRUN, graph(node("Mystery", ["x"], ["y"], domain="com.example"), domains=["other"])),
    ("operator-of-the-future", UNRUN, graph(node("Gelu", ["x"], ["y"]), opset=11)),
    ("contrib-operator", OK, graph(node("Gelu", ["x"], ["y"], domain="com.microsoft"), domains=["com.microsoft"])),
    ("too-few-inputs", REFUSED, graph(node("Add", ["x"], ["y"]))),
    ("too-many-inputs", REFUSED, graph(node("Relu", ["x", "x", "x"], ["y"]))),
    ("too-many-outputs", REFUSED, graph(node("Relu", ["x"], ["y", "z"]))),
    ("required-input-left-out", REFUSED, graph(node("Add", ["x", ""], ["y"]))),
    ("no-outputs-of-a-node", REFUSED, graph(RELU, node("Neg", ["x"], []))),
    ("attribute-unknown", UNRUN, graph(node("Relu", ["x"], ["y"], temperature=3))),
    ("attribute-missing", REFUSED, graph(node("Cast", ["x"], ["y"]))),
    ("attribute-of-another-type", REFUSED, graph(node("Softmax", ["x"], ["y"], axis="last"))),
    ("attribute-out-of-range", UNRUN, graph(node("Softmax", ["x"], ["y"], axis=2**40))),
    ("cast-to-nothing", UNRUN, graph(node("Cast", ["x"], ["y"], to=999))),
    ("cast-after-cast-to-nothing", UNRUN, graph(node("Cast", ["x"], ["t"], to=999), node("Cast", ["t"], ["y"], to=-5))),
    (
        "quantized-to-nothing",
        UNRUN,
        graph(
            node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=999),
            node("DequantizeLinear", ["q", "s"], ["y"]),
            initializers=[weight("s", 0.5)],
        ),
    ),
    ("perm-too-long", UNRUN, graph(node("Transpose", ["x"], ["y"], perm=list(range(100))))),
    ("perm-twice-the-same", UNRUN, graph(node("Transpose", ["x"], ["y"], perm=[0, 0]))),
    ("types-that-do-not-fit", UNRUN, graph(node("Not", ["x"], ["y"]))),
    ("conv-of-a-vector", UNRUN, graph(node("Conv", ["x", "x"], ["y"]))),
    ("concat-of-nothing", REFUSED, graph(node("Concat", [], ["y"], axis=0))),
):
    KINDS.add(name, outcome, make)


def attributed(*change: Callable[[AttributeProto], Any], twice: bool = False) -> Any:
    def make(_folder: object, _rng: object) -> onnx.ModelProto:
        proto = made(node("LeakyRelu", ["x"], ["y"], alpha=0.1))
        for each in change:
            each(proto.graph.node[0].attribute[0])
        if twice:
            proto.graph.node[0].attribute.append(proto.graph.node[0].attribute[0])
        return proto

    return make


KINDS.add("attribute-twice", REFUSED, attributed(twice=True))
KINDS.add("attribute-unnamed", REFUSED, attributed(lambda a: a.ClearField("name")))
KINDS.add("attribute-type-unknown", ANY, attributed(lambda a: a.ClearField("type")))
KINDS.add("attribute-type-lies", REFUSED, attributed(lambda a: setattr(a, "type", AttributeProto.INTS)))
KINDS.add("attribute-graph-without-graph", REFUSED, attributed(lambda a: setattr(a, "type", AttributeProto.GRAPH)))
KINDS.add("attribute-tensor-without-tensor", REFUSED, attributed(lambda a: setattr(a, "type", AttributeProto.TENSOR)))
KINDS.add("attribute-with-everything", ANY, attributed(lambda a: a.MergeFrom(AttributeProto(i=3, s=b"x", ints=[1]))))
KINDS.add("attribute-reference-outside", ANY, attributed(lambda a: setattr(a, "ref_attr_name", "ghost")))

# Extremes that are legal

KINDS.add("chain-of-3000", OK, lambda _f, _r: builders.chain(3000))
KINDS.add("concat-of-2000", OK, graph(node("Concat", ["x"] * 2000, ["h"], axis=0), node("ReduceSum", ["h"], ["y"])))


@KINDS.kind("chain-of-3000-backwards", OK)
def _backwards(_folder: object, _rng: object) -> onnx.ModelProto:
    proto = builders.chain(3000)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


@KINDS.kind("weights-1000", OK)
def _weights(_folder: object, _rng: object) -> onnx.ModelProto:
    names = [f"w{i}" for i in range(1000)]
    return made(node("Sum", ["x", *names], ["y"]), initializers=[weight(n, [i, 1]) for i, n in enumerate(names)])


@KINDS.kind("outputs-500", OK)
def _outputs(_folder: object, _rng: object) -> onnx.ModelProto:
    names = [f"y{i}" for i in range(500)]
    nodes = [node("Add", ["x", "x"], [name]) for name in names]
    return builders.model(nodes, [value("x")], [value(n) for n in names])


# Bodies


def conditional(then: onnx.GraphProto, other: onnx.GraphProto | None = None) -> onnx.ModelProto:
    other = other or builders.branch("e", [node("Neg", ["x"], ["e"])], "e")
    proto = made(node("If", ["c"], ["y"], then_branch=then, else_branch=other))
    proto.graph.input.append(value("c", (), TensorProto.BOOL))
    return proto


def body(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[Any], outputs: Sequence[Any], **more: Any
) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "body", list(inputs), list(outputs), **more)


def loop(inner: onnx.GraphProto, trips: int = 3, carried: Sequence[str] = ("x",)) -> onnx.ModelProto:
    return made(
        node("Loop", ["trips", "", *carried], ["y"], body=inner),
        initializers=[weight("trips", trips, np.int64)],
    )


STEP = [value("i", (), TensorProto.INT64), value("c", (), TensorProto.BOOL), value("s")]
KEEP = node("Identity", ["c"], ["c2"])
RESULT = [value("c2", (), TensorProto.BOOL), value("s2")]

for name, outcome, make in (
    ("if-without-else", ANY, lambda: made(node("If", ["x"], ["y"], then_branch=builders.branch("t", [NEG], "y")))),
    (
        "if-of-unlike-branches",
        UNRUN,
        lambda: conditional(body([RELU, node("Neg", ["x"], ["z"])], [], [value("y"), value("z")])),
    ),
    (
        "if-branch-with-an-input",
        UNRUN,
        lambda: conditional(body([node("Relu", ["q"], ["z"])], [value("q")], [value("z")])),
    ),
    ("if-branch-empty", ANY, lambda: conditional(body([], [], []))),
    ("if-branch-hides-a-name", ANY, lambda: conditional(builders.branch("t", [node("Neg", ["x"], ["x"])], "x"))),
    (
        "body-reads-from-nowhere",
        REFUSED,
        lambda: conditional(builders.branch("t", [node("Neg", ["ghost"], ["t"])], "t")),
    ),
    ("body-makes-it-twice", REFUSED, lambda: conditional(builders.branch("t", [node("Neg", ["x"], ["t"])] * 2, "t"))),
    ("body-with-a-cycle", REFUSED, lambda: conditional(builders.branch("t", [node("Add", ["x", "t"], ["t"])], "t"))),
    ("body-reads-its-own-node", REFUSED, lambda: conditional(builders.branch("t", [node("Neg", ["y"], ["t"])], "t"))),
    ("loop", OK, lambda: loop(body([KEEP, node("Relu", ["s"], ["s2"])], STEP, RESULT))),
    ("loop-body-without-inputs", UNRUN, lambda: loop(body([node("Relu", ["x"], ["s2"])], [], [value("s2")]))),
    ("loop-body-with-too-few-outputs", UNRUN, lambda: loop(body([KEEP], STEP, RESULT[:1]))),
    ("loop-carries-nothing", UNRUN, lambda: loop(body([KEEP, node("Relu", ["s"], ["s2"])], STEP, RESULT), carried=())),
    ("loop-of-0-trips", OK, lambda: loop(body([KEEP, node("Relu", ["s"], ["s2"])], STEP, RESULT), trips=0)),
    ("loop-of-negative-trips", OK, lambda: loop(body([KEEP, node("Relu", ["s"], ["s2"])], STEP, RESULT), trips=-7)),
    ("nested-30", OK, lambda: builders.nested(30)),
    ("nested-31", REFUSED, lambda: builders.nested(31)),
):
    KINDS.add(name, outcome, lambda _f, _r, make=make: make())
