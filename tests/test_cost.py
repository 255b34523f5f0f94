"""MACs by hand, shapes with the inputs given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt.cost import macs, node_macs, shapes

MODELS = Path(__file__).resolve().parents[1] / "fixtures" / "models"


@pytest.mark.parametrize(
    ("op_type", "inputs", "output", "attributes", "expected"),
    [
        # 6 outputs a pixel on 5x5 pixels, each 4 channels of 3x3
        ("Conv", [(1, 4, 7, 7), (6, 4, 3, 3)], (1, 6, 5, 5), {}, 6 * 25 * 4 * 9),
        ("Conv", [(2, 4, 7, 7), (6, 4, 3, 3), (6,)], (2, 6, 5, 5), {}, 2 * 6 * 25 * 4 * 9),
        ("Conv", [(1, 4, 7, 7), (6, 2, 3, 3)], (1, 6, 5, 5), {"group": 2}, 6 * 25 * 2 * 9),
        ("Conv", [(1, 4, 7, 7), (4, 1, 3, 3)], (1, 4, 7, 7), {"group": 4}, 4 * 49 * 9),
        ("Conv", [(1, 3, 10), (5, 3, 4)], (1, 5, 7), {}, 5 * 7 * 3 * 4),
        ("Conv", [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2)], (1, 3, 3, 3, 3), {}, 3 * 27 * 2 * 8),
        ("ConvInteger", [(1, 4, 7, 7), (6, 4, 3, 3)], (1, 6, 5, 5), {}, 6 * 25 * 4 * 9),
        # every input element meets the kernels of all output channels of its group
        ("ConvTranspose", [(1, 4, 5, 5), (4, 6, 3, 3)], (1, 6, 7, 7), {}, 4 * 25 * 6 * 9),
        ("ConvTranspose", [(1, 4, 5, 5), (4, 3, 2, 2)], (1, 6, 10, 10), {"group": 2}, 4 * 25 * 3 * 4),
        ("MatMul", [(3, 4), (4, 5)], (3, 5), {}, 60),
        ("MatMul", [(4,), (4, 5)], (5,), {}, 20),
        ("MatMul", [(3, 4), (4,)], (3,), {}, 12),
        ("MatMul", [(4,), (4,)], (), {}, 4),
        ("MatMul", [(7, 1, 3, 4), (2, 4, 5)], (7, 2, 3, 5), {}, 7 * 2 * 3 * 5 * 4),
        ("MatMulInteger", [(3, 4), (4, 5)], (3, 5), {}, 60),
        ("Gemm", [(3, 4), (4, 5)], (3, 5), {}, 60),
        ("Gemm", [(3, 4), (5, 4)], (3, 5), {"transB": 1}, 60),
        ("Gemm", [(4, 3), (4, 5)], (3, 5), {"transA": 1}, 60),
        ("Gemm", [(4, 3), (5, 4)], (3, 5), {"transA": 1, "transB": 1}, 60),
        # 6 steps of 2 samples; 4 gates of 8 units read 3 inputs and 8 states
        ("LSTM", [(6, 2, 3), (1, 32, 3)], (6, 1, 2, 8), {}, 6 * 2 * 4 * 8 * (3 + 8)),
        ("LSTM", [(6, 2, 3), (2, 32, 3)], None, {}, 2 * 6 * 2 * 4 * 8 * (3 + 8)),
        ("GRU", [(6, 2, 3), (1, 24, 3)], None, {}, 6 * 2 * 3 * 8 * (3 + 8)),
        ("RNN", [(6, 2, 3), (1, 8, 3)], None, {}, 6 * 2 * 8 * (3 + 8)),
        ("Relu", [(3, 4)], (3, 4), {}, 0),
        ("Reshape", [None, None], None, {}, 0),
        ("Conv", [None, (6, 4, 3, 3)], (1, 6, 5, 5), {}, None),
        ("Conv", [(1, 4, 7, 7), (6, 4, 3, 3)], None, {}, None),
        ("MatMul", [(3, 4)], (3, 5), {}, None),
        ("LSTM", [(6, 2), (32, 3)], None, {}, None),
    ],
)
def test_by_hand(op_type: str, inputs: Any, output: Any, attributes: dict[str, int], expected: int | None) -> None:
    assert macs(op_type, inputs, output, attributes) == expected


def _model() -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Conv", ["x", "w"], ["c"], group=2),
                helper.make_node("NonZero", ["c"], ["z"]),
                helper.make_node("Mystery", ["c"], ["m"], domain="com.example"),
                helper.make_node("GlobalAveragePool", ["c"], ["g"]),
                helper.make_node("Flatten", ["g"], ["f"]),
                helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
            ],
            "g",
            [info("x", TensorProto.FLOAT, ["batch", 4, "height", 5])],
            [info("y", TensorProto.FLOAT, ["batch", 3])],
            [
                helper.make_tensor("w", TensorProto.FLOAT, [6, 2, 3, 3], [0.0] * 108),
                helper.make_tensor("v", TensorProto.FLOAT, [3, 6], [0.0] * 18),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)],
    )


def test_shapes_take_symbolic_dims_from_the_feeds() -> None:
    proto = _model()
    before = proto.SerializeToString()
    known = shapes(proto, {"x": (2, 4, 9, 5)})
    assert known["c"] == (2, 6, 7, 3)
    assert known["y"] == (2, 3)
    assert known["w"] == (6, 2, 3, 3)
    assert "z" not in known  # depends on data
    assert "m" not in known  # nobody knows
    counted = [node_macs(n, known) for n in proto.graph.node]
    assert counted == [2 * 6 * 21 * 2 * 9, 0, 0, 0, 0, 2 * 3 * 6]
    assert proto.SerializeToString() == before


def test_without_feeds_symbolic_dims_count_as_one() -> None:
    known = shapes(_model())
    assert known["x"] == (1, 4, 1, 5)


def test_a_negative_dim_is_symbolic_too() -> None:
    proto = _model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert shapes(proto)["x"][0] == 1


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_every_fixture_is_counted_without_an_error(path: Path) -> None:
    proto = onnx.load(path)
    with np.load(MODELS.parent / "data" / f"{path.stem}.npz") as stored:
        known = shapes(proto, {k: (1, *stored[k].shape[1:]) for k in stored.files})
    counted = [node_macs(n, known) for n in proto.graph.node]
    assert all(c is None or c >= 0 for c in counted)
    assert any(counted) or path.stem in ("bigfold", "control")
