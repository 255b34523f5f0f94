"""Texts that are no text, or that somebody would rather not print, store or compare."""

from __future__ import annotations

from collections.abc import Callable

import builders
import onnx
from onnx import helper

from hostile.corpus import ANY, OK, REFUSED, Group

KINDS = Group("names")
MARK = "MARKMARK"


def named(name: str) -> onnx.ModelProto:
    """x -> Relu -> ``name`` -> Neg -> y, nodes and a weight called like it too."""
    nodes = [
        helper.make_node("Relu", ["x"], [name], name=f"{name}-node"),
        helper.make_node("Neg", [name], ["h"], name=f"{name}-other"),
        helper.make_node("Add", ["h", f"{name}-w"], ["y"]),
    ]
    weights = [builders.weight(f"{name}-w", [1, 2])]
    return builders.model(nodes, [builders.value("x")], [builders.value("y")], weights)


def interface(name: str) -> onnx.ModelProto:
    """The input and the output bear the name."""
    node = helper.make_node("Relu", [name], [f"{name}'"])
    return builders.model([node], [builders.value(name)], [builders.value(f"{name}'")])


def marked(change: Callable[[onnx.ModelProto], None], replacement: bytes) -> bytes:
    """A model with ``MARK`` put somewhere, its bytes then replaced: protobuf itself writes no such text."""
    proto = builders.relu()
    change(proto)
    assert len(replacement) == len(MARK)
    return proto.SerializeToString().replace(MARK.encode(), replacement)


for label, text in {
    "emoji": "🦜" * 5,
    "right-to-left": "‮evil‬",
    "combining": "e\u0301\u0301",
    "newline": "a\nerror: forged; line",
    "carriage-return": "a\rerror: forged; line",
    "ansi": "\x1b[31mred\x1b[2J",
    "nul": "a\0b",
    "path": "../../../etc/passwd",
    "windows-device": "CON",
    "percent": "%s%n%d{0}{x}",
    "markup": "<script>alert(1)</script>",
    "rich-markup": "[bold red]x[/] [link=file:///etc/passwd]y",
    "long-100000": "n" * 100_000,
    "space": " ",
    "quote": "'; rm -rf ~ #",
}.items():
    KINDS.add(f"value-{label}", OK, lambda _f, _r, text=text: named(text))
    if label in ("emoji", "nul", "path", "long-100000", "newline", "ansi", "markup"):
        KINDS.add(f"input-{label}", OK, lambda _f, _r, text=text: interface(text))

PLACES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "node-name": lambda p: setattr(p.graph.node[0], "name", MARK),
    "op-type": lambda p: setattr(p.graph.node[0], "op_type", MARK),
    "domain": lambda p: setattr(p.graph.node[0], "domain", MARK),
    "node-doc": lambda p: setattr(p.graph.node[0], "doc_string", MARK),
    "input": lambda p: (setattr(p.graph.input[0], "name", MARK), p.graph.node[0].input.__setitem__(0, MARK))[0],
    "graph-name": lambda p: setattr(p.graph, "name", MARK),
    "producer": lambda p: setattr(p, "producer_name", MARK),
    "metadata-key": lambda p: helper.set_model_props(p, {MARK: "x"}),
    "metadata-value": lambda p: helper.set_model_props(p, {"x": MARK}),
    "dim-param": lambda p: setattr(p.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", MARK),
    "opset-domain": lambda p: p.opset_import.extend([helper.make_opsetid(MARK, 1)]),
    "attribute": lambda p: p.graph.node[0].attribute.extend([helper.make_attribute(MARK, 1)]),
    "value-info": lambda p: p.graph.value_info.extend([builders.value(MARK)]),
}
for place, change in PLACES.items():
    outcome = ANY if place == "value-info" else REFUSED  # of a value that is not there, nothing is kept
    KINDS.add(f"no-utf8-{place}", outcome, lambda _f, _r, c=change: marked(c, b"\xff\xfe\xc3\x28\xa0\xa1\xe2\x28"))
KINDS.add("surrogate-node-name", REFUSED, lambda _f, _r: marked(PLACES["node-name"], b"\xed\xa0\x80abcde"))


@KINDS.kind("case-differs", OK)
def _case(_folder: object, _: object) -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", ["x"], ["H"]), helper.make_node("Neg", ["H"], ["h"])]
    return builders.model(
        [*nodes, helper.make_node("Add", ["H", "h"], ["y"])], [builders.value("x")], [builders.value("y")]
    )


@KINDS.kind("normal-forms-differ", OK)
def _normal(_folder: object, _: object) -> onnx.ModelProto:
    one, two = "\u00e9", "e\u0301"
    nodes = [helper.make_node("Relu", ["x"], [one]), helper.make_node("Neg", [one], [two])]
    nodes.append(helper.make_node("Add", [one, two], ["y"]))
    return builders.model(nodes, [builders.value("x")], [builders.value("y")])


@KINDS.kind("all-nodes-of-one-name", OK)
def _same(_folder: object, _: object) -> onnx.ModelProto:
    proto = builders.chain(50)
    for node in proto.graph.node:
        node.name = "same"
    return proto


@KINDS.kind("metadata-key-twice", OK)
def _twice(_folder: object, _: object) -> onnx.ModelProto:
    proto = builders.relu()
    for entry in ("a", "b"):
        proto.metadata_props.add(key="k", value=entry)
    return proto


@KINDS.kind("metadata-of-10-MB", OK)
def _large(_folder: object, _: object) -> onnx.ModelProto:
    proto = builders.relu()
    proto.metadata_props.add(key="k", value="v" * 10_000_000)
    proto.doc_string = "d" * 1_000_000
    return proto


@KINDS.kind("our-own-reserved-names", OK)
def _reserved(_folder: object, _: object) -> onnx.ModelProto:
    """Names under which graphopt hides things from onnx-ir, or gives to what it adds, used by a stranger."""
    proto = named("graphopt.residue:0")
    proto.graph.node[0].metadata_props.add(key="graphopt.residue.type", value="bm90IGEgdHlwZQ==")
    proto.graph.node[0].name = "graphopt.size:y"
    return proto
