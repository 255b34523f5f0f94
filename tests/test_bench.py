"""graphopt bench: models timed against each other, shapes that are not fixed, and where the time goes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, MODELS, run_cli
from onnx import TensorProto, helper, numpy_helper
from test_report import documented
from test_schema import check

import graphopt
from graphopt.benchmark import shaped
from graphopt.model import interface, load
from graphopt.profiling import profile
from graphopt.report.bench import print_bench
from graphopt.report.units import plural
from graphopt.timing import time_models, usable_cpus

Watch = Callable[[Path], AbstractContextManager[None]]
DIGITS = DEMO / "digits.onnx"
ENCODER = MODELS / "encoder.onnx"


def square(length: int, name: str = "x") -> onnx.ModelProto:
    """``length`` products with a square matrix, each its own work."""
    values = [name, *(f"v{i}" for i in range(length - 1)), "y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [a, "w"], [b], name=f"mul{i}") for i, (a, b) in enumerate(pairwise(values))],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 256])],
        [numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@cache
def digits() -> dict[str, Any]:
    return graphopt.bench([DIGITS, DIGITS], data=DEMO / "evaluation.npz", profile=True, time=0.1)


def test_the_report_is_as_documented() -> None:
    report = digits()
    assert report.keys() == documented("bench")
    check(report, "benched")
    check(graphopt.bench(square(1), time=0.05, threads=1), "benched")


def test_a_heavier_model_is_slower_by_its_work() -> None:
    report = graphopt.bench([square(2), square(20)], input_shapes={"x": (64, 256)}, time=0.3, threads=1)
    (timing,) = report["timings"]
    light, heavy = timing["results"]
    assert light["ratio"] is None
    assert 4 < heavy["ratio"]["median"] < 20
    assert heavy["ratio"]["low"] <= heavy["ratio"]["median"] <= heavy["ratio"]["high"]
    for one in (light, heavy):
        assert 0 < one["low"] <= one["median"] <= one["high"]
        assert one["runs"] == light["runs"] >= 10


def test_one_thread_and_all_of_them_or_as_many_as_asked() -> None:
    assert [t["threads"] for t in digits()["timings"]] == sorted({1, usable_cpus()})
    assert [t["threads"] for t in graphopt.bench(DIGITS, threads=2, time=0.05)["timings"]] == [2]


def test_real_samples_or_as_many_random_ones_as_asked() -> None:
    assert digits()["data"]["source"].endswith("evaluation.npz")
    report = graphopt.bench(DIGITS, samples=2, time=0.05, threads=1)
    assert report["data"]["source"] == "random"
    assert report["data"]["samples"] == 2
    assert report["inputs"] == [{"name": "image", "type": "float32", "shape": [1, 1, 8, 8]}]


def test_each_model_may_have_feeds_of_its_own() -> None:
    from graphopt.session import Session

    sessions = {"a": Session(square(1), threads=1), "b": Session(square(1, "z"), threads=1)}
    feeds = {"a": [{"x": np.ones((1, 256), np.float32)}], "b": [{"z": np.ones((1, 256), np.float32)}]}
    timings, _ = time_models(sessions, feeds, seconds=0.02)
    assert timings["a"].runs == timings["b"].runs


# Shapes


def test_dims_of_any_size_take_what_input_shape_says(workplace: Path) -> None:
    onnx.save(square(1), "m.onnx")
    ran = run_cli("bench", "m.onnx", "--input-shape", "x:7,256", "--time", "0.05", "--threads", "1", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["inputs"][0]["shape"] == [7, 256]
    assert ran.json["options"]["input_shapes"] == {"x": [7, 256]}


def test_the_model_given_keeps_its_shapes() -> None:
    model = load(square(1))
    assert interface(shaped(model, {"x": (3, 256)}))[0][0].shape == (3, 256)
    assert interface(model)[0][0].shape == ("n", 256)


BAD = {
    "no-model": (["bench"], "missing argument"),
    "missing": (["bench", "nope.onnx"], "no such file"),
    "time": (["bench", DIGITS, "--time", "0"], "--time 0"),
    "shape-text": (["bench", DIGITS, "--input-shape", "image"], "write name:1,3,224,224"),
    "shape-number": (["bench", DIGITS, "--input-shape", "image:1,x,8,8"], "write name:1,3,224,224"),
    "shape-zero": (["bench", DIGITS, "--input-shape", "image:0,1,8,8"], "whole numbers from 1"),
    "shape-rank": (["bench", DIGITS, "--input-shape", "image:1,8,8"], "give 4 numbers"),
    "shape-fixed": (["bench", DIGITS, "--input-shape", "image:1,3,8,8"], "is fixed in the model"),
    "shape-name": (["bench", DIGITS, "--input-shape", "picture:1,1,8,8"], "the inputs are image"),
    "shape-and-data": (
        ["bench", DIGITS, "--input-shape", "image:1,1,8,8", "--data", DEMO / "evaluation.npz"],
        "give one of them",
    ),
    "other-inputs": (["bench", DIGITS, ENCODER], "only models that take the same inputs"),
    "data": (["bench", DIGITS, "--data", "nope.npz"], "nope.npz"),
    "custom": (["bench", MODELS / "custom.onnx"], "cannot load the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_timed_is_one_line(name: str, workplace: Path, untouched: Watch) -> None:
    arguments, fragment = BAD[name]
    with untouched(workplace):
        ran = run_cli(*arguments)
    assert ran.code == 2, ran.err
    assert fragment in ran.error
    assert ran.out == ""


def test_inputs_that_do_not_run_are_told_with_what_helps() -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([3, 5]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(graphopt.InputError, match=r"x:1,8.*give --input-shape"):
        graphopt.bench(model, time=0.05, threads=1)
    assert graphopt.bench(model, input_shapes={"x": (3, 5)}, time=0.05, threads=1)["timings"]


def test_no_models_is_an_error() -> None:
    with pytest.raises(graphopt.InputError, match="no model"):
        graphopt.bench([])


# The profile


def test_the_profile_names_our_nodes() -> None:
    model = onnx.load(DIGITS)
    ours = {node.name for node in model.graph.node}
    found = digits()["profiles"][0]
    named = [node for node in found["nodes"] if node["node"] is not None]
    assert {node["node"] for node in named} <= ours
    assert sum(node["share"] for node in found["nodes"]) == pytest.approx(1)
    assert sum(node["seconds"] for node in named) > 0.8 * found["seconds"]
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    assert convolutions <= {node["node"] for node in named}, "every convolution runs, whatever it is fused with"
    taken_in = {name for node in named if node["op_type"] == "Conv" for name in node["fused"]}
    assert {n.name for n in model.graph.node if n.op_type == "BatchNormalization"} <= taken_in
    assert [n["seconds"] for n in found["nodes"]] == sorted((n["seconds"] for n in found["nodes"]), reverse=True)


def test_integer_kernels_go_by_the_name_of_the_layer() -> None:
    made = graphopt.quantize(DIGITS, data=DEMO / "calibration.npz", samples=8, time=0).ir_model
    times, runs = profile(made, [{"image": np.zeros((1, 1, 8, 8), np.float32)}], seconds=0.05)
    assert runs >= 5
    integer = {t.node for t in times if any("QLinear" in op or op == "QGemm" for op, _ in t.runtime)}
    assert {node.name for node in made.graph if node.op_type == "Conv"} <= integer


def test_a_body_that_runs_many_times_counts_each() -> None:
    ones, times = numpy_helper.from_array(np.ones((1, 4), np.float32), "one"), numpy_helper.from_array(np.array(7), "n")
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go"]),
            helper.make_node("Add", ["at", "one"], ["next"], name="step"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("at", TensorProto.FLOAT, [1, 4]),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, 4]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "", "x"], ["y"], name="loop", body=body)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [ones, times],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    times_of = {t.node: t for t in profile(model, [{"x": np.zeros((1, 4), np.float32)}], seconds=0.05)[0]}
    assert {"loop", "step"} <= times_of.keys()
    assert times_of["step"].seconds > 0


# The text


def shown(report: dict[str, Any], **options: Any) -> str:
    stream = io.StringIO()
    print_bench(report, stream=stream, **options)
    return stream.getvalue()


def test_the_text_has_the_reports_numbers() -> None:
    report = copy.deepcopy(digits())
    second = report["timings"][0]["results"][1]
    second["ratio"] = {"median": 1.5, "low": 1.25, "high": 1.75}
    page = shown(report)
    assert "1.500x   1.250 to 1.750  slower" in page
    assert "samples of" in page
    hidden = len(report["profiles"][0]["nodes"]) - 12
    assert f"{plural(hidden, 'more node')} take" in page
    every = shown(report, verbose=True)
    assert all(node["node"] in every for node in report["profiles"][0]["nodes"] if node["node"])
    for timing in report["timings"]:  # what was really measured may be noise on one of them
        timing["results"][1]["ratio"] = {"median": 1.5, "low": 0.9, "high": 1.75}
    assert "slower" not in shown(report)


def test_the_command_line_shows_models_and_nodes(workplace: Path) -> None:
    ran = run_cli("bench", DIGITS, "--time", "0.05", "--profile")
    assert ran.code == 0, ran.err
    assert "median" in ran.out
    assert "runs as" in ran.out
    assert ran.err == ""
