"""Values of branches handed out: what a run would have computed there, or nothing where it was not taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import RuntimeFailure
from graphopt.lifting import lift
from graphopt.model import load
from graphopt.session import Session
from graphopt.taps import tap_chunks

FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL


def branch(name: str, *nodes: onnx.NodeProto, output: str) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(output, FLOAT, ["N"])])


def model(*, inner: str = "deep") -> onnx.ModelProto:
    """y = If(a): If(b): Neg(Exp(x)) else Abs(x); else: Relu(x)."""
    deep = branch("d", helper.make_node("Exp", ["x"], [inner]), helper.make_node("Neg", [inner], ["d_y"]), output="d_y")
    flat = branch("f", helper.make_node("Abs", ["x"], ["flat"]), helper.make_node("Neg", ["flat"], ["f_y"]),
                  output="f_y")  # fmt: skip
    then = branch("t", helper.make_node("If", ["b"], ["t_y"], then_branch=deep, else_branch=flat), output="t_y")
    other = branch("e", helper.make_node("Relu", ["x"], ["rest"]), helper.make_node("Neg", ["rest"], ["e_y"]),
                   output="e_y")  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("If", ["a"], ["y"], then_branch=then, else_branch=other)],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N"]), *(helper.make_tensor_value_info(c, BOOL, []) for c in "ab")],
        [helper.make_tensor_value_info("y", FLOAT, ["N"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


X = np.array([-1.0, 2.0, 0.5], np.float32)
VALUES = {"deep": np.exp(X), "flat": np.abs(X), "rest": np.maximum(X, 0)}


@pytest.mark.parametrize(("a", "b", "taken"), [(True, True, "deep"), (True, False, "flat"), (False, True, "rest")])
def test_the_branch_taken_hands_out_its_values_and_the_others_nothing(a: bool, b: bool, taken: str) -> None:
    feeds: dict[str, Any] = {"x": X, "a": np.array(a), "b": np.array(b)}
    names = list(VALUES)
    for outputs in (True, False):
        got = Session(load(model()), taps=names, outputs=outputs, threads=1).run(feeds)
        assert set(got) == {*names, *(["y"] if outputs else [])}
        for name in names:
            np.testing.assert_allclose(got[name], VALUES[name] if name == taken else np.zeros(0), rtol=1e-6)


def test_their_sizes_are_measured_too() -> None:
    feeds: dict[str, Any] = {"x": X, "a": np.array(True), "b": np.array(True)}
    assert tap_chunks(load(model()), ["rest", "deep", "flat"], feeds, cap=12, threads=1) == [["rest", "deep", "flat"]]
    assert tap_chunks(load(model()), ["deep", "rest"], feeds, cap=11, threads=1) == [["deep"], ["rest"]]


def test_a_name_that_two_branches_use_cannot_be_told_apart() -> None:
    proto = model(inner="rest")
    assert lift(proto.graph, {"rest", "flat"}).keys() == {"flat"}


def looping(*inner: onnx.NodeProto, axis: list[int | str]) -> onnx.ModelProto:
    """``inner`` makes next of state, twice."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), *inner],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", BOOL, []),
         helper.make_tensor_value_info("state", FLOAT, axis)],
        [helper.make_tensor_value_info("on", BOOL, []), helper.make_tensor_value_info("next", FLOAT, axis)],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, axis)],
        [helper.make_tensor_value_info("y", FLOAT, axis)],
        [numpy_helper.from_array(np.int64(2), "trips")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_loop_hands_out_what_it_made_in_all_turns() -> None:
    proto = looping(helper.make_node("Exp", ["state"], ["next"]), axis=["N"])
    got = Session(load(proto), taps=["next", "state"], threads=1).run({"x": X})
    np.testing.assert_allclose(got["state"], [X, np.exp(X)], rtol=1e-6)
    np.testing.assert_allclose(got["next"], [np.exp(X), np.exp(np.exp(X))], rtol=1e-6)
    np.testing.assert_allclose(got["y"], got["next"][1])


def test_turns_are_stacked_like_samples() -> None:
    proto = looping(helper.make_node("Exp", ["state"], ["next"]), axis=[1, "N"])
    got = Session(load(proto), taps=["next"], outputs=False, threads=1).run({"x": X[None]})
    assert got["next"].shape == (2, 3)
    assert tap_chunks(load(proto), ["next"], {"x": X[None]}, threads=1) == [["next"]]


def test_what_differs_in_size_from_turn_to_turn_is_handed_out_by_nobody() -> None:
    proto = looping(helper.make_node("Concat", ["state", "state"], ["next"], axis=0), axis=["N"])
    with pytest.raises(RuntimeFailure):
        Session(load(proto), taps=["next"], threads=1).run({"x": X})
    assert tap_chunks(load(proto), ["next", "y"], {"x": X}, threads=1) == [["y"]]
