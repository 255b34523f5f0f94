"""Functions of the model's own: recursion, and growth that the file's size says nothing about."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import builders
import onnx
from builders import value
from onnx import helper

from hostile.corpus import ANY, OK, REFUSED, UNRUN, Group

KINDS = Group("function")
OPSETS = [helper.make_opsetid("", builders.OPSET), helper.make_opsetid("f", 1)]


def function(name: str, nodes: Sequence[onnx.NodeProto], *, opsets: Any = OPSETS, **more: Any) -> onnx.FunctionProto:
    """a -> ``nodes`` -> b."""
    return helper.make_function("f", name, ["a"], ["b"], list(nodes), opsets, **more)


def called(name: str, *functions: onnx.FunctionProto) -> onnx.ModelProto:
    call = helper.make_node(name, ["x"], ["y"], domain="f")
    return builders.model([call], [value("x")], [value("y")], domains=["f"], functions=functions)


def tower(levels: int, calls: int) -> onnx.ModelProto:
    """Each function calls the one below ``calls`` times in a row: calls ** levels nodes."""
    found = [function("F0", [helper.make_node("Relu", ["a"], ["b"])])]
    for level in range(1, levels + 1):
        names = ["a", *(f"v{i}" for i in range(1, calls)), "b"]
        nodes = [
            helper.make_node(f"F{level - 1}", [before], [after], domain="f")
            for before, after in itertools.pairwise(names)
        ]
        found.append(function(f"F{level}", nodes))
    return called(f"F{levels}", *found)


RELU = helper.make_node("Relu", ["a"], ["b"])


def call(name: str) -> onnx.NodeProto:
    return helper.make_node(name, ["a"], ["b"], domain="f")


def in_body(name: str) -> onnx.NodeProto:
    """A call hidden in the branch of an If."""
    branch = builders.branch("t", [helper.make_node(name, ["a"], ["t"], domain="f")], "t")
    return helper.make_node("If", ["c"], ["b"], then_branch=branch, else_branch=branch)


CONDITION = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True]))

for name, outcome, made in (
    ("calls-itself", REFUSED, lambda: called("A", function("A", [call("A")]))),
    ("calls-each-other", REFUSED, lambda: called("A", function("A", [call("B")]), function("B", [call("A")]))),
    ("calls-itself-in-a-body", REFUSED, lambda: called("A", function("A", [CONDITION, in_body("A")]))),
    ("recursion-nobody-calls", REFUSED, lambda: called("Z", function("A", [call("A")]), function("Z", [RELU]))),
    (
        "ring-of-500",
        REFUSED,
        lambda: called("A0", *(function(f"A{i}", [call(f"A{(i + 1) % 500}")]) for i in range(500))),
    ),
    ("twice", REFUSED, lambda: called("A", function("A", [RELU]), function("A", [RELU]))),
    ("missing", UNRUN, lambda: called("Ghost", function("A", [RELU]))),
    ("calls-a-missing-one", UNRUN, lambda: called("A", function("A", [call("Ghost")]))),
    ("without-opsets", ANY, lambda: called("A", function("A", [RELU], opsets=[]))),
    ("of-another-opset", ANY, lambda: called("A", function("A", [RELU], opsets=[helper.make_opsetid("", 7)]))),
    ("reads-from-nowhere", REFUSED, lambda: called("A", function("A", [helper.make_node("Relu", ["ghost"], ["b"])]))),
    ("makes-nothing", REFUSED, lambda: called("A", function("A", [helper.make_node("Relu", ["a"], ["q"])]))),
    ("empty", REFUSED, lambda: called("A", function("A", []))),
    ("unnamed", ANY, lambda: called("A", function("", [RELU]), function("A", [RELU]))),
    ("with-a-cycle", REFUSED, lambda: called("A", function("A", [helper.make_node("Add", ["a", "b"], ["b"])]))),
    ("attribute-not-given", ANY, lambda: called("A", function("A", [RELU], attributes=["alpha"]))),
    ("tower-3-deep", OK, lambda: tower(3, 3)),
    ("tower-of-4096", OK, lambda: tower(12, 2)),
    ("tower-of-8192", OK, lambda: tower(13, 2)),
    ("tower-of-65536", REFUSED, lambda: tower(16, 2)),
    ("tower-2-to-the-20", REFUSED, lambda: tower(20, 2)),
    ("tower-2-to-the-60", REFUSED, lambda: tower(60, 2)),
    ("tower-10-to-the-40", REFUSED, lambda: tower(40, 10)),
    ("tower-of-1000-levels", REFUSED, lambda: tower(1000, 2)),
    ("single-calls-60-deep", OK, lambda: tower(60, 1)),
    ("single-calls-5000-deep", REFUSED, lambda: tower(5000, 1)),
):
    KINDS.add(name, outcome, lambda _f, _r, made=made: made())


@KINDS.kind("tower-in-bodies", REFUSED)
def _in_bodies(_folder: object, _rng: object) -> onnx.ModelProto:
    """The calls stand in branches, where a count of the nodes of functions alone does not see them."""
    found = [function("F0", [RELU])]
    found += [function(f"F{level}", [CONDITION, in_body(f"F{level - 1}")]) for level in range(1, 31)]
    return called("F30", *found)


@KINDS.kind("shadows-an-operator", ANY)
def _shadow(_folder: object, _rng: object) -> onnx.ModelProto:
    proto = builders.relu()
    relu = helper.make_function("", "Relu", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], OPSETS[:1])
    proto.functions.append(relu)
    return proto
