"""compute-fp32: a float16 model computes in float32, and nobody outside notices but by better numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, run_cli
from onnx import TensorProto, helper, numpy_helper
from support import apply, build, initializers, node, ops, reasons, run, sqnr

import graphopt
from graphopt.errors import PreconditionError
from graphopt.passes.compute_fp32 import ComputeFp32

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
WIDTH = 8


def half(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def body(name: str, op: str) -> onnx.GraphProto:
    """A branch with a weight of its own and a declared float16 value; it reads ``a`` from outside."""
    nodes = [node("MatMul", ["a", f"w_{name}"], f"m_{name}"), node(op, [f"m_{name}"], f"o_{name}")]
    weight = numpy_helper.from_array(half(WIDTH, WIDTH, seed=2), f"w_{name}")
    declared = [helper.make_tensor_value_info(f"m_{name}", HALF, ["n", WIDTH])]
    ends = [helper.make_tensor_value_info(f"o_{name}", HALF, ["n", WIDTH])]
    return helper.make_graph(nodes, name, [], ends, [weight], value_info=declared)


def everything() -> onnx.ModelProto:
    """Weights, Constants, Casts there and back, an If, an output that is used inside, one that is stored."""
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Constant", [], "half", value=numpy_helper.from_array(np.float16(0.5))),
        node("Mul", ["a", "half"], "b"),
        node("ReduceMax", ["b"], "peak", keepdims=0),
        node("Constant", [], "zero", value=numpy_helper.from_array(np.float16(0))),
        node("Greater", ["peak", "zero"], "above"),
        node("If", ["above"], "branch", then_branch=body("then", "Relu"), else_branch=body("else", "Neg")),
        node("Cast", ["branch"], "wide", to=FLOAT),
        node("Exp", ["wide"], "e"),
        node("Cast", ["e"], "narrow", to=HALF),
        node("Shape", ["narrow"], "shape"),
        node("ConstantOfShape", ["shape"], "three", value=numpy_helper.from_array(np.array([3], np.float16))),
        node("Add", ["narrow", "three"], "y"),
        node("Sigmoid", ["y"], "z"),
        node("CastLike", ["e", "k"], "like"),
        node("Add", ["like", "k"], "u"),
    ]
    outputs = {"y": ("n", WIDTH), "z": ("n", WIDTH), "u": ("n", WIDTH), "k": (WIDTH,)}
    weights = {"w": half(WIDTH, WIDTH, seed=1) / 2, "k": half(WIDTH)}
    return build(nodes, {"x": ("n", WIDTH)}, outputs, weights, dtype=HALF)


def elements(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}


def test_everything_inside_is_float32_and_nothing_outside_changes() -> None:
    proto = everything()
    made, entry = apply(proto, ComputeFp32())
    onnx.checker.check_model(made, full_check=True)
    assert [(v.name, v.type) for v in made.graph.input] == [(v.name, v.type) for v in proto.graph.input]
    assert [(v.name, v.type) for v in made.graph.output] == [(v.name, v.type) for v in proto.graph.output]
    kinds = elements(made)
    assert {name for name, kind in kinds.items() if kind == HALF} == {"x", "y", "z", "u", "k"}
    assert {name: a.dtype for name, a in initializers(made).items()} == {"w": np.float32, "k": np.float16}
    assert entry.metrics["casts"] == ops(made).count("Cast") - 2 == 5  # x, k; y, z, u; the two that were there
    for seed in range(4):
        feed = {"x": half(3, WIDTH, seed=seed + 5) * np.float16((-1) ** seed)}
        before, after = run(proto, feed), run(made, feed)
        for name, value in before.items():
            assert (value.dtype, after[name].dtype) == (np.float16, np.float16)
            assert sqnr(value.astype(np.float32), after[name].astype(np.float32)) > 50, name


def test_a_second_run_finds_nothing_but_what_it_put_there() -> None:
    made, _ = apply(everything(), ComputeFp32())
    again, _ = apply(made, ComputeFp32())
    assert elements(again) == elements(made) | {n: k for n, k in elements(again).items() if n not in elements(made)}
    plain, entry = apply(build([node("Relu", ["x"], "y")], {"x": ("n",)}, ["y"]), ComputeFp32())
    assert (entry.status, reasons(entry)) == ("unchanged", {"(graph)": "nothing computes in float16"})
    assert ops(plain) == ["Relu"]


def test_more_than_one_use_of_an_input_and_an_output_listed_by_two_names() -> None:
    nodes = [node("Add", ["x", "x"], "a"), node("Identity", ["a"], "y"), node("Identity", ["a"], "z")]
    made, _ = apply(build(nodes, {"x": ("n",)}, {"y": ("n",), "z": ("n",)}, dtype=HALF), ComputeFp32())
    got = run(made, {"x": np.array([1, 60000], np.float16)})
    np.testing.assert_array_equal(got["y"], np.array([2, np.inf], np.float16))
    np.testing.assert_array_equal(got["z"], got["y"])


def test_a_table_keeps_its_bytes_and_its_rows_are_cast() -> None:
    nodes = [
        node("Cast", ["x"], "i", to=TensorProto.INT64),
        node("Gather", ["table", "i"], "rows"),
        node("MatMul", ["rows", "w"], "y"),
    ]
    weights = {"table": half(50, WIDTH), "w": half(WIDTH, 3, seed=1)}
    proto = build(nodes, {"x": ("n",)}, {"y": ("n", 3), "rows": ("n", WIDTH)}, weights, dtype=HALF)
    made, entry = apply(proto, ComputeFp32())
    assert {name: a.dtype for name, a in initializers(made).items()} == {"table": np.float16, "w": np.float32}
    assert entry.metrics["casts"] == 3  # x, the rows, y; rows as an output are what they were
    feed = {"x": np.array([3, 0, 49], np.float16)}
    before, after = run(proto, feed), run(made, feed)
    np.testing.assert_array_equal(before["rows"], after["rows"])
    assert sqnr(before["y"].astype("f"), after["y"].astype("f")) > 50


def test_what_is_stored_and_returned_keeps_its_type_though_nobody_reads_it() -> None:
    proto = build([node("Relu", ["x"], "y")], {"x": (2,)}, {"y": (2,), "k": (3,)}, {"k": half(3)}, dtype=HALF)
    made, _ = apply(proto, ComputeFp32())
    assert [v.type for v in made.graph.output] == [v.type for v in proto.graph.output]
    feed = {"x": half(2)}
    np.testing.assert_array_equal(run(made, feed)["k"], run(proto, feed)["k"])


def test_rows_that_a_branch_returns_are_of_the_other_branch_s_type() -> None:
    ends = [helper.make_tensor_value_info(f"{name}_end", HALF, None) for name in ("rows", "neg")]
    table = numpy_helper.from_array(half(5, WIDTH), "table")
    looked = helper.make_graph([node("Gather", ["table", "i"], "rows_end")], "rows", [], ends[:1], [table])
    other = helper.make_graph([node("Neg", ["x"], "neg_end")], "neg", [], ends[1:])
    nodes = [node("If", ["c"], "y", then_branch=looked, else_branch=other)]
    weights = {"i": np.array([0, 4]), "c0": np.float32(0)}
    proto = build(nodes, {"x": (2, WIDTH)}, {"y": (2, WIDTH)}, weights, dtype=HALF)
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    made, _ = apply(proto, ComputeFp32())
    onnx.checker.check_model(made, full_check=True)
    for taken in (True, False):
        feed = {"x": half(2, WIDTH, seed=1), "c": np.array(taken)}
        np.testing.assert_array_equal(run(made, feed)["y"], run(proto, feed)["y"])


def test_a_value_that_a_caller_may_override_stays_what_it_is() -> None:
    proto = build([node("MatMul", ["x", "w"], "y")], {"x": ("n", WIDTH)}, {"y": ("n", WIDTH)}, dtype=HALF)
    proto.graph.initializer.append(numpy_helper.from_array(half(WIDTH, WIDTH), "w"))
    proto.graph.input.append(helper.make_tensor_value_info("w", HALF, [WIDTH, WIDTH]))
    made, _ = apply(proto, ComputeFp32())
    assert initializers(made)["w"].dtype == np.float16
    other = {"x": half(2, WIDTH, seed=1), "w": half(WIDTH, WIDTH, seed=2)}
    assert sqnr(run(proto, other)["y"].astype("f"), run(made, other)["y"].astype("f")) > 50


def test_what_cannot_be_followed_is_refused() -> None:
    foreign = build([node("Twice", ["x"], "y", domain="shop")], {"x": (2,)}, ["y"], dtype=HALF, domains=["shop"])
    with pytest.raises(PreconditionError, match="n_y is a shop::Twice, which may ask for float16"):
        apply(foreign, ComputeFp32())
    relu = helper.make_function(
        "f",
        "F",
        ["a"],
        ["b"],
        [node("Cast", ["a"], "h", to=HALF), node("Cast", ["h"], "b", to=FLOAT)],
        [helper.make_opsetid("", 17)],
    )
    calls = build([node("F", ["x"], "y", domain="f")], {"x": (2,)}, ["y"], domains=["f"])
    calls.functions.append(relu)
    with pytest.raises(PreconditionError, match="run inline-functions first"):
        apply(calls, ComputeFp32())


def test_a_float16_model_is_quantized(workplace: Path) -> None:
    narrow = graphopt.compress(DEMO / "digits.onnx", weights="fp16-compute", data=DEMO / "calibration.npz", time=0)
    narrow.save("half.onnx")
    words = ("--data", str(DEMO / "calibration.npz"), "--eval-data", str(DEMO / "evaluation.npz"), "--time", "0")
    ran = run_cli("quantize", "half.onnx", "-o", "int8.onnx", *words, "--metric", "accuracy", "--json")
    assert ran.code == 0, ran.err
    ledger = {entry["pass"]: entry for entry in ran.json["ledger"]}
    assert ledger["compute-fp32"]["status"] == "changed"
    assert ledger["quantize-static"]["metrics"]["layers_quantized"] == 10
    assert ran.json["output"]["bytes"] < 0.6 * ran.json["input"]["bytes"]
    gain = ran.json["metric"]
    assert gain["candidate"] >= gain["original"] - 0.01
