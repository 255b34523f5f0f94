"""What is drawn of a changed graph: the right nodes, places that look alike once, boxes that can be read."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO
from onnx import TensorProto, helper, numpy_helper

from graphopt import api
from graphopt.report import regions
from graphopt.report.drawing import Box, draw
from graphopt.report.regions import changed_regions


def chain(*operators: str, **attributes: Any) -> onnx.ModelProto:
    """x -> the operators one after another -> y."""
    nodes, at = [], "x"
    for index, op_type in enumerate(operators):
        weights = ["w"] if op_type in ("MatMul", "Add") else []
        given = attributes if op_type == "Softmax" else {}
        nodes.append(helper.make_node(op_type, [at, *weights], [f"v{index}"], name=f"{op_type}_{index}", **given))
        at = f"v{index}"
    nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ("x", "y")]
    weight = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def kinds(region: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((node["kind"], node["operator"]) for node in region["nodes"])


def test_the_same_graph_has_nothing_to_draw() -> None:
    a = chain("Relu", "MatMul", "Softmax")
    b = copy.deepcopy(a)
    for node in b.graph.node:
        node.name = f"other_{node.name}"
    found = changed_regions(a, b)
    assert (found["added"], found["removed"], found["changed"], found["regions"]) == (0, 0, 0, [])
    assert found["why"] is None


def test_nodes_that_came_went_and_changed() -> None:
    a = chain("Relu", "Identity", "MatMul", "Softmax", "Tanh")
    b = chain("Relu", "MatMul", "Softmax", "Sigmoid", "Tanh", axis=0)
    found = changed_regions(a, b)
    assert (found["added"], found["removed"], found["changed"]) == (1, 1, 1)
    drawn = [one for region in found["regions"] for one in kinds(region)]
    assert ("removed", "Identity") in drawn
    assert ("added", "Sigmoid") in drawn
    assert ("changed", "Softmax") in drawn
    assert ("same", "Relu") in drawn, "its neighbours stand beside it"
    details = {node["detail"] for region in found["regions"] for node in region["nodes"]}
    assert any(text.startswith("axis: -1 (default) → 0") for text in details)


def test_other_weights_are_a_change() -> None:
    a, b = chain("MatMul", "Relu"), chain("MatMul", "Relu")
    b.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    (region,) = changed_regions(a, b)["regions"]
    assert [n["detail"] for n in region["nodes"] if n["kind"] == "changed"] == ["new weights"]


def test_places_that_look_alike_are_drawn_once() -> None:
    a = chain(*["Relu", "Identity", "MatMul"] * 9)
    b = chain(*["Relu", "MatMul"] * 9)
    found = changed_regions(a, b)
    assert found["removed"] == 9
    assert [(region["operator"], region["places"]) for region in found["regions"]] == [("MatMul", 9)]
    assert len(found["regions"][0]["names"]) == 4
    assert found == changed_regions(a, b)


def test_a_long_stretch_is_cut_and_says_so() -> None:
    found = changed_regions(chain("Relu", *["Sin"] * 40, "Tanh"), chain("Relu", "Tanh"))
    (region,) = found["regions"]
    shown = sum(node["kind"] == "removed" for node in region["nodes"])
    assert shown + region["hidden"] == 40
    assert shown <= 10
    assert ("same", "Tanh") in kinds(region), "the end that leads on is the one that is shown"


def test_more_kinds_of_place_than_a_page_takes_are_counted() -> None:
    names = ["Sin", "Cos", "Exp", "Abs", "Neg", "Ceil", "Floor", "Round", "Erf"]
    found = changed_regions(chain(*[n for op in names for n in ("Relu", op, "Tanh")]), chain(*["Relu", "Tanh"] * 9))
    assert len(found["regions"]) + found["left_out"] == 9
    assert len(found["regions"]) == 6


def test_what_cannot_be_drawn_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = chain("Relu", "MatMul"), chain("Relu", "MatMul", "Tanh")
    assert "no such file" in changed_regions("none.onnx", b)["why"].lower()
    monkeypatch.setattr(regions, "NODES", 2)
    assert "3 nodes are too many" in changed_regions(a, b)["why"]
    monkeypatch.setattr(regions, "WEIGHTS", 63)
    assert "too many weights" in changed_regions(a, b)["why"]


def test_a_quantized_model() -> None:
    result = api.quantize(DEMO / "digits.onnx", data=DEMO / "calibration.npz", samples=16, time=0)
    assert result.original is not None
    found = changed_regions(result.original, result.ir_model)
    report = result.report
    before, after = (report[key]["operators"] for key in ("input", "output"))
    counted = {key: sum(m.values()) - m.get("Constant", 0) for key, m in (("before", before), ("after", after))}
    assert found["added"] - found["removed"] == counted["after"] - counted["before"]
    assert any(("added", "QuantizeLinear") in kinds(region) for region in found["regions"])
    for region in found["regions"]:
        readable(region)


def readable(region: dict[str, Any]) -> None:
    """No box on another, everything on the sheet, every line from a box down to a box."""
    boxes = [(n["x"], n["y"], n["x"] + n["width"], n["y"] + n["height"]) for n in region["nodes"]]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert all(x >= 0 and y >= 0 and r <= region["width"] and d <= region["height"] for x, y, r, d in boxes)
    assert len(boxes) <= 16
    assert region["edges"]
    for edge in region["edges"]:
        numbers = [float(t) for t in edge["path"].replace("M", " ").replace("C", " ").replace("V", " ").split()]
        assert any(x < numbers[0] < r and numbers[1] == pytest.approx(d, abs=0.1) for x, _, r, d in boxes)
        assert any(x < numbers[-2] < r and 0 < y - numbers[-1] < 6 for x, y, r, _ in boxes)


def test_a_circle_is_drawn_too() -> None:
    boxes = {k: Box("same", "Add", k) for k in "abc"}
    drawn = draw(boxes, [("a", "b", "same"), ("b", "c", "added"), ("c", "a", "removed")], str)
    assert len(drawn["nodes"]) == 3
    assert len(drawn["edges"]) == 3


def test_a_line_past_other_rows_goes_around_their_boxes() -> None:
    boxes = {k: Box("same", "Add", k) for k in "abcd"}
    wires = [("a", "b", "same"), ("b", "c", "same"), ("c", "d", "same"), ("a", "d", "same")]
    drawn = draw(boxes, wires, str)
    middle = next(n for n in drawn["nodes"] if n["name"] == "b")
    at = float(drawn["edges"][3]["path"].partition("V")[0].split()[-2])
    assert not middle["x"] <= at <= middle["x"] + middle["width"]


def test_long_names_keep_what_tells_them_apart() -> None:
    boxes = {0: Box("added", "AVeryLongOperatorNameIndeed", "model/block1/layer2/conv3/Conv_quantize", "d" * 99)}
    (node,) = draw(boxes, [], str)["nodes"]
    assert node["name"].endswith("conv3/Conv_quantize"[-20:])
    assert all(len(node[key]) <= 22 for key in ("operator", "name", "detail"))
    assert "model/block1" in node["title"]
