"""``inspect``: any model, nothing run, no weight read, unknown is said."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import DATA, DEMO, MODELS, run_cli
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.errors import InputError, ModelError
from graphopt.inspection import inspect_model

EVERY = sorted([*MODELS.glob("*.onnx"), DEMO / "digits.onnx"], key=lambda p: p.name)


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_every_fixture(path: Path) -> None:
    report = inspect_model(path)
    proto = onnx.load(path)
    assert report["path"] == str(path)
    assert report["bytes"] == path.stat().st_size
    assert report["ir_version"] == proto.ir_version
    assert report["nodes"] == sum(report["operators"].values()) >= len(proto.graph.node)
    assert [v["name"] for v in report["outputs"]] == [v.name for v in proto.graph.output]
    assert report["weight_bytes"] == sum(report["bytes_by_type"].values())
    assert report["largest"] == sorted(report["largest"], key=lambda t: (-t["bytes"], t["name"]))


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_the_text_has_the_reports_numbers(path: Path) -> None:
    ran = run_cli("inspect", path)
    assert ran.code == 0, ran.err
    report = inspect_model(path)
    assert re.search(rf"^nodes +{report['nodes']}\b", ran.out, re.MULTILINE)
    for value in (*report["inputs"], *report["outputs"]):
        assert f"{value['name']}  {value['type']}" in ran.out
    assert len(ran.out.splitlines()) <= 30  # one screen
    assert all(line == line.rstrip() for line in ran.out.splitlines())


def test_macs_and_parameters_of_a_known_model() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["z"]),
    ]
    weights = {"w": np.zeros((8, 3, 3, 3), np.float32), "m": np.zeros((8, 5), np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(a, name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    report = inspect_model(model)
    assert report["parameters"] == 8 * 27 + 40
    assert report["macs"] == 16 * 16 * 8 * 27 + 40
    assert report["macs_unknown_nodes"] == 0
    assert inspect_model(model, dims={"n": 4})["macs"] == 4 * report["macs"]
    assert report["inputs"] == [{"name": "x", "type": "float", "shape": ["n", 3, 16, 16]}]
    with pytest.raises(InputError, match="its inputs have n"):
        inspect_model(model, dims={"batch": 4})


def test_unknown_shapes_are_said_and_not_guessed() -> None:
    report = inspect_model(MODELS / "encoder.onnx")
    assert report["macs_unknown_nodes"] > 0
    assert (
        f"? for {report['macs_unknown_nodes']} nodes of unknown shape"
        in run_cli("inspect", MODELS / "encoder.onnx").out
    )


def test_an_unknown_operator_is_counted_under_its_domain() -> None:
    assert inspect_model(MODELS / "custom.onnx")["operators"]["com.example::MysteryOp"] == 1


def test_subgraphs_are_counted() -> None:
    report = inspect_model(MODELS / "control.onnx")
    assert report["subgraphs"] == 3
    assert report["operators"]["If"] == report["operators"]["Loop"] == 1


def test_initializers_listed_as_inputs_are_no_inputs() -> None:
    assert [v["name"] for v in inspect_model(MODELS / "overridable.onnx")["inputs"]] == ["image"]


def test_coverage_of_a_quantized_model() -> None:
    assert inspect_model(MODELS / "shared.onnx")["quantization"] is None
    quantized = graphopt.quantize(MODELS / "shared.onnx", data=DATA / "shared.npz", time=0).model
    found = inspect_model(quantized)["quantization"]
    assert found["heavy_nodes_integer"] > 0
    assert found["heavy_nodes"] >= found["heavy_nodes_integer"]
    dynamic = graphopt.quantize(MODELS / "encoder.onnx", mode="dynamic", time=0).model
    assert inspect_model(dynamic)["quantization"]["heavy_nodes_integer"] > 0


def test_external_weights_are_counted_and_not_read(tmp_path: Path) -> None:
    onnx.save_model(
        onnx.load(MODELS / "shared.onnx"),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    (tmp_path / "m.data").unlink()
    report, plain = inspect_model(tmp_path / "m.onnx"), inspect_model(MODELS / "shared.onnx")
    assert report["external_bytes"] == report["weight_bytes"] == plain["weight_bytes"]
    assert plain["external_bytes"] == 0
    assert "of external weights" in run_cli("inspect", tmp_path / "m.onnx").out


def test_an_undefined_type_is_one_line() -> None:
    model = onnx.load(MODELS / "shared.onnx")
    model.graph.initializer[0].data_type = 77
    with pytest.raises(ModelError, match="unknown type"):
        inspect_model(model)


def test_several_models_stand_side_by_side(workplace: Path) -> None:
    first, second = MODELS / "gru.onnx", MODELS / "lstm.onnx"
    ran = run_cli("inspect", first, second)
    assert re.search(r"^operator +gru.onnx +lstm.onnx$", ran.out, re.MULTILINE)
    both = run_cli("inspect", first, second, "--json").json
    assert both["models"] == [inspect_model(str(first)), inspect_model(str(second))]


def test_standard_input() -> None:
    ran = run_cli("inspect", "-", "--json", stdin=(MODELS / "gru.onnx").read_bytes())
    assert ran.json["path"] is None
    assert ran.json["bytes"] > 0
