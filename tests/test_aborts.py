"""Models that ONNX Runtime dies of, and takes the process with it: refused by us, and never made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run_cli
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.aborts import MOVES, fatal, moved_into_bodies
from graphopt.errors import RuntimeFailure
from graphopt.model import load
from graphopt.session import Session

node = helper.make_node
MADE = {
    "MaxPool": node("MaxPool", ["d"], ["v"], kernel_shape=[1, 1]),
    "Reshape": node("Reshape", ["d", "shape"], ["v"]),
    "Slice": node("Slice", ["d", "zero", "one"], ["v"]),
    "Squeeze": node("Squeeze", ["d"], ["v"]),
    "Transpose": node("Transpose", ["d"], ["v"], perm=[0, 2, 3, 1]),
    "Unsqueeze": node("Unsqueeze", ["d", "zero"], ["v"]),
    "Relu": node("Relu", ["d"], ["v"]),
    "Flatten": node("Flatten", ["d"], ["v"]),
}


def branch(op: str, read: str) -> onnx.GraphProto:
    end = helper.make_tensor_value_info(f"{op}_end", TensorProto.FLOAT, None)
    return helper.make_graph([node(op, [read], [f"{op}_end"])], op, [], [end])


def chosen(*first: onnx.NodeProto, weights: dict[str, Any], given: onnx.ValueInfoProto) -> onnx.ModelProto:
    """``first``, and an If whose branches read what they make, ``v``, from outside."""
    branches = {"then_branch": branch("Neg", "v"), "else_branch": branch("Abs", "v")}
    inputs = [given, helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph([*first, node("If", ["c"], ["y"], **branches)], "g", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def dequantized(moved: onnx.NodeProto) -> onnx.ModelProto:
    zero, one = np.array([0], np.int64), np.array([1], np.int64)
    weights = {"s": np.float32(0.1), "z": np.uint8(3), "shape": np.array([2, -1], np.int64), "zero": zero, "one": one}
    given = helper.make_tensor_value_info("x", TensorProto.UINT8, [2, 2, 2, 4])
    return chosen(node("DequantizeLinear", ["x", "s", "z"], ["d"]), moved, weights=weights, given=given)


@pytest.mark.parametrize("op", MADE)
def test_it_is_refused_where_the_runtime_would_die_and_only_there(op: str) -> None:
    proto = dequantized(MADE[op])
    Session(proto, optimize=False)
    if op in MOVES:
        with pytest.raises(RuntimeFailure, match=r"would end the process: 'v' is dequantized \('d'\), moved, and read"):
            Session(proto)
    else:
        Session(proto)


def test_bodies_are_looked_into_and_what_they_make_themselves_is_theirs() -> None:
    assert set(MADE) - MOVES == {"Relu", "Flatten"}
    inside = dequantized(MADE["Transpose"]).graph
    empty = helper.make_graph([node("Identity", ["s"], ["end"])], "e", [], [inside.output[0]])
    outer = helper.make_graph([node("If", ["c"], ["o"], then_branch=inside, else_branch=empty)], "o", [], [])
    assert "'v' is dequantized" in str(fatal(outer))
    own = helper.make_graph([node("Neg", ["k"], ["v"]), node("Abs", ["v"], ["end"])], "own", [], [])
    shadowed = dequantized(MADE["Transpose"]).graph
    for attribute in shadowed.node[-1].attribute:
        attribute.g.CopyFrom(own)
    assert fatal(shadowed) is None


def test_long_chains_that_branch_are_walked_once() -> None:
    chain = [node("Slice", [f"v{i}"] * 3, [f"v{i + 1}"]) for i in range(3000)]
    weights = {"s": np.float32(0.1), "z": np.uint8(3)}
    given = helper.make_tensor_value_info("x", TensorProto.UINT8, [2])
    start = node("DequantizeLinear", ["x", "s", "z"], ["v0"])
    harmless = chosen(start, *chain, node("Relu", ["v0"], ["v"]), weights=weights, given=given)
    assert moved_into_bodies(next(iter(load(harmless).graph))) == []
    assert fatal(harmless.graph) is None
    chain[-1].output[0] = "v"
    proto = chosen(start, *chain, weights=weights, given=given)
    assert {user.op_type for user, _ in moved_into_bodies(next(iter(load(proto).graph)))} == {"Slice"}
    assert "moved, and read by a body" in str(fatal(proto.graph))


def net() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(8, 4, 3, 3)).astype(np.float32), "m": rng.normal(size=(8, 6)).astype(np.float32)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 3, 1]),
        node("MatMul", ["t", "m"], ["p"]),
        node("Transpose", ["p"], ["v"], perm=[0, 3, 1, 2]),
        node("Reshape", ["t", "shape"], ["u"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 8, 8])
    proto = chosen(*nodes, weights={**weights, "shape": np.array([0, -1], np.int64)}, given=given)
    proto.graph.node[-1].attribute[1].g.node[0].input[0] = "u"
    return proto


def samples(count: int = 16) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=(count, 4, 8, 8)).astype(np.float32), "c": np.arange(count) % 2 == 0}


def test_quantize_makes_none(workplace: Path) -> None:
    onnx.save(net(), "m.onnx")
    np.savez("d.npz", **samples())
    ran = run_cli("quantize", "m.onnx", "-o", "q.onnx", "--data", "d.npz", "--time", "0", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["comparison"]["outputs"][0]["sqnr_db"] > 25
    made = onnx.load("q.onnx")
    operators = [n.op_type for n in made.graph.node]
    assert "QuantizeLinear" in operators
    assert "Mean" in operators
    assert fatal(made.graph) is None
    again = graphopt.optimize("q.onnx", time=0)
    assert fatal(again.model.graph) is None
    Session(again.model)


def test_a_model_like_that_is_one_line(workplace: Path) -> None:
    onnx.save(dequantized(MADE["Transpose"]), "m.onnx")
    ran = run_cli("bench", "m.onnx", "--time", "0.1")
    assert ran.code == 2
    assert "would end the process" in ran.error
    assert run_cli("inspect", "m.onnx").code == 0
    ran = run_cli("lint", "m.onnx")
    assert ran.code == 1
    assert "Transpose moves what it makes to a body, of which ONNX Runtime dies" in " ".join(ran.out.split())
    assert run_cli("lint", "m.onnx", "--target", "openvino").code == 0


def test_where_nothing_is_compressed_nothing_is_touched(workplace: Path) -> None:
    onnx.save(dequantized(MADE["Transpose"]), "m.onnx")
    ran = run_cli("compress", "m.onnx", "-o", "c.onnx", "--weights", "int8")
    assert ran.code == 3, ran.out
    assert not Path("c.onnx").exists()
