"""inline-functions: what the function does in place of the call, and never more nodes than allowed."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import helper
from support import apply, build, node, ops, reasons, run

from graphopt.base import Context
from graphopt.errors import OverBudget, PreconditionError
from graphopt.model import load
from graphopt.passes.inline_functions import InlineFunctions


def function(name: str, nodes: list[onnx.NodeProto], opset: int = 17) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return helper.make_function("mine", name, ["a"], ["b"], nodes, imports)


def calls(count: int, functions: list[onnx.FunctionProto], name: str = "F") -> onnx.ModelProto:
    values = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    nodes = [node(name, [values[i]], values[i + 1], domain="mine") for i in range(count)]
    proto = build(nodes, {"x": [2]}, ["y"], domains=["mine"])
    proto.functions.extend(functions)
    proto.ir_version = 9
    return proto


TWO = [node("Abs", ["a"], "t"), node("Sqrt", ["t"], "b")]


def test_two_calls() -> None:
    proto = calls(2, [function("F", TWO)])
    after, entry = apply(proto, InlineFunctions())
    assert ops(after) == ["Abs", "Sqrt"] * 2
    assert [o.name for o in after.graph.output] == ["y"]
    assert not after.functions
    assert [c.detail for c in entry.changes] == ["2 calls (n_v0, n_y)"]
    x = {"x": np.array([4, -9], np.float32)}
    assert run(after, x)["y"].tobytes() == run(proto, x)["y"].tobytes()
    _, entry = apply(after, InlineFunctions())
    assert "no functions" in reasons(entry)["(graph)"]


def test_functions_in_functions() -> None:
    outer = function("G", [node("F", ["a"], "t", domain="mine"), node("F", ["t"], "b", domain="mine")])
    after, _ = apply(calls(1, [function("F", TWO), outer], "G"), InlineFunctions())
    assert ops(after) == ["Abs", "Sqrt"] * 2


def test_exponential_growth_is_refused_at_once() -> None:
    made = [function("F0", TWO)]
    for i in range(1, 60):
        inner = [node(f"F{i - 1}", ["a"], "t", domain="mine"), node(f"F{i - 1}", ["t"], "b", domain="mine")]
        made.append(function(f"F{i}", inner))
    started = time.perf_counter()
    with pytest.raises(OverBudget, match=r"over 1e18 nodes once its functions are put in, more than 10000"):
        apply(calls(1, made, "F59"), InlineFunctions(), verify="off")
    assert time.perf_counter() - started < 10
    with pytest.raises(PreconditionError, match="inlining would make 4 nodes"):
        apply(calls(2, [function("F", TWO)]), InlineFunctions(max_nodes=3), verify="off")


def test_many_calls_take_time_in_proportion() -> None:
    """Sixteen times as many calls; each counting the names of all before it would take 256 times as long."""

    def seconds(count: int) -> float:
        model = load(calls(count, [function("F", TWO)]))
        started = time.process_time()
        InlineFunctions().run(model, Context(original=model))
        spent = time.process_time() - started
        values = [v.name for n in model.graph for v in n.outputs]
        assert len(set(values)) == len(values) == 2 * count
        assert len({n.name for n in model.graph}) == 2 * count
        return spent

    assert seconds(3200) < 60 * min(seconds(200) for _ in range(2))


def test_a_name_that_is_taken_is_not_given_again() -> None:
    proto = calls(3, [function("F", TWO)])
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "t_2"
    after, _ = apply(proto, InlineFunctions())
    made = [o for n in after.graph.node for o in n.output]
    assert len(set(made)) == len(made) == 6
    x = {"x": np.array([4, -9], np.float32)}
    assert run(after, x)["y"].tobytes() == run(proto, x)["y"].tobytes()


def test_another_operator_set_stays() -> None:
    proto = calls(1, [function("F", TWO, opset=13)])
    after, entry = apply(proto, InlineFunctions(), verify="off")
    assert ops(after) == ["F"]
    assert "version 13" in reasons(entry)["mine::F"]


def test_without_functions_that_is_said() -> None:
    _, entry = apply(build([node("Neg", ["x"], "y")], {"x": [2]}, ["y"]), InlineFunctions())
    assert "no functions" in reasons(entry)["(graph)"]
