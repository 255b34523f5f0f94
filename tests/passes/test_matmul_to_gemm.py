"""matmul-to-gemm: only matrices, only a row, only what inference knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import apply, build, initializers, node, ops, reasons, run

from graphopt.passes.matmul_to_gemm import MatmulToGemm

RNG = np.random.default_rng(6)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def dense(
    bias: np.ndarray, shape: list[Any] | None = None, weight: np.ndarray | None = None, **options: Any
) -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "w"], "m"), node("Add", ["m", "b"], "y")]
    weights = {"w": normal(4, 5) if weight is None else weight, "b": bias}
    return build(nodes, {"x": shape or ["N", 4]}, ["y"], weights, **options)


@pytest.mark.parametrize("bias", [(5,), (1, 5), (1,), (), (1, 1)])
@pytest.mark.parametrize("opset", [7, 9, 17])
def test_a_product_and_a_row(bias: tuple[int, ...], opset: int) -> None:
    proto = dense(np.asarray(normal(*bias), np.float32), opset=opset)
    after, entry = apply(proto, MatmulToGemm())
    assert ops(after) == ["Gemm"], entry.skipped
    assert after.graph.node[0].name == "n_m"
    for batch in (1, 3):
        feeds = {"x": normal(batch, 4)}
        np.testing.assert_allclose(run(after, feeds)["y"], run(proto, feeds)["y"], rtol=1e-5, atol=1e-5)
    again, entry = apply(after, MatmulToGemm())
    assert again == after
    assert "no constant is added" in reasons(entry)["(graph)"]


def test_in_a_body_with_docs() -> None:
    inner = [node("MatMul", ["x", "w"], "m"), node("Add", ["b", "m"], "o")]
    inner[0].doc_string = "dense"
    body = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("o", 1, None)])
    other = helper.make_graph([node("MatMul", ["x", "w"], "e")], "e", [], [helper.make_tensor_value_info("e", 1, None)])
    weights = {"w": normal(4, 5), "b": normal(5)}
    proto = build([node("If", ["g"], "y", then_branch=body, else_branch=other)], {"x": [2, 4]}, ["y"], weights)
    proto.graph.input.append(helper.make_tensor_value_info("g", TensorProto.BOOL, []))
    after, entry = apply(proto, MatmulToGemm())
    assert len(entry.changes) == 1
    made = next(a.g for a in after.graph.node[0].attribute if a.name == "then_branch").node[0]
    assert (made.op_type, made.doc_string) == ("Gemm", "dense")
    assert set(initializers(after)) == {"w", "b"}
    feeds = {"x": normal(2, 4), "g": np.array(True)}
    np.testing.assert_allclose(run(after, feeds)["y"], run(proto, feeds)["y"], rtol=1e-5, atol=1e-5)


def _refused(change: str) -> tuple[onnx.ModelProto, str]:
    if change == "rank 3":
        return dense(normal(5), [2, 3, 4]), "rank 3"
    if change == "declared only":
        proto = build(
            [node("Reshape", ["x", "s"], "r"), node("MatMul", ["r", "w"], "m"), node("Add", ["m", "b"], "y")],
            {"x": [2, 3, 4]},
            ["y"],
            {"w": normal(4, 5), "b": normal(5)},
        )
        proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.INT64, ["k"]))
        proto.graph.value_info.append(helper.make_tensor_value_info("r", 1, ["N", 4]))
        return proto, "not known"
    if change == "column":
        return dense(normal(3, 1), [3, 4]), "no row"
    if change == "broadcast changes shape":
        return dense(normal(5), weight=normal(4, 1)), "no row"
    if change == "three axes":
        return dense(normal(1, 1, 5)), "no row"
    if change == "integers":
        return dense(np.ones(5, np.int32), weight=np.ones((4, 5), np.int32), dtype=TensorProto.INT32), "int32"
    if change == "opset 6":
        proto = dense(normal(5), opset=6)
        proto.graph.node[1].attribute.append(helper.make_attribute("broadcast", 1))
        return proto, "upgrade-opset"
    if change == "overridable":
        proto = dense(normal(5))
        proto.graph.input.append(helper.make_tensor_value_info("w", 1, [4, 5]))
        return proto, "override"
    proto = dense(normal(5))
    proto.graph.output.append(helper.make_tensor_value_info("m", 1, None))
    return proto, "read elsewhere"


@pytest.mark.parametrize(
    "change",
    [
        *("rank 3", "declared only", "column", "broadcast changes shape", "three axes", "integers", "opset 6"),
        *("overridable", "output"),
    ],
)
def test_what_is_left_says_why(change: str) -> None:
    proto, expected = _refused(change)
    kept, entry = apply(proto, MatmulToGemm(), verify="off")
    assert kept == proto
    assert expected in reasons(entry)["n_y"]
