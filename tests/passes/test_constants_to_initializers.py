"""constants-to-initializers: the same value under the same name, where an initializer may stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import apply, build, initializers, node, ops, reasons, run, size

from graphopt.passes.constants_to_initializers import ConstantsToInitializers

X = {"x": np.array([1, -2], np.float32)}


def added(**value: Any) -> onnx.ModelProto:
    """y = x + constant (cast to float)."""
    nodes = [node("Constant", [], "k", **value), node("Cast", ["k"], "f", to=1), node("Add", ["x", "f"], "y")]
    return build(nodes, {"x": [2]}, ["y"])


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({"value": numpy_helper.from_array(np.array([1, 2], np.float64))}, (2,)),
        ({"value_float": 0.1}, ()),
        ({"value_floats": [0.1, 0.2]}, (2,)),
        ({"value_int": 3}, ()),
        ({"value_ints": [3, 4]}, (2,)),
    ],
)
def test_every_dense_form(value: dict[str, Any], shape: tuple[int, ...]) -> None:
    proto = added(**value)
    after, entry = apply(proto, ConstantsToInitializers())
    assert ops(after) == ["Cast", "Add"]
    assert initializers(after)["k"].shape == shape
    assert [c.site for c in entry.changes] == ["n_k"]
    assert size(after) < size(proto)
    assert run(after, X)["y"].tobytes() == run(proto, X)["y"].tobytes()
    again, entry = apply(after, ConstantsToInitializers())
    assert again == after
    assert "no Constant" in reasons(entry)["(graph)"]


def test_narrow_types() -> None:
    tensor = helper.make_tensor("t", TensorProto.INT4, [3], [1, -2, 7])
    proto = build(
        [node("Constant", [], "k", value=tensor), node("Cast", ["k"], "y", to=1)], {}, ["y"], opset=21, ir_version=10
    )
    after, _ = apply(proto, ConstantsToInitializers(), verify="off")
    assert after.graph.initializer[0].data_type == TensorProto.INT4
    assert run(after, {})["y"].tolist() == [1, -2, 7]


def test_texts() -> None:
    tensor = numpy_helper.from_array(np.array(["p", "q"], object), "t")
    nodes = [node("Constant", [], "k", value=tensor), node("Concat", ["k", "k"], "y", axis=0)]
    after, _ = apply(build(nodes, {}, ["y"], out_dtype=TensorProto.STRING), ConstantsToInitializers(), verify="off")
    assert ops(after) == ["Concat"]
    assert list(run(after, {})["y"]) == ["p", "q", "p", "q"]


def test_in_a_body() -> None:
    info = [helper.make_tensor_value_info("o", 1, None)]
    inner = [node("Constant", [], "k", value_float=2.0), node("Add", ["x", "k"], "o")]
    bodies = [helper.make_graph(inner, f"b{i}", [], info) for i in (0, 1)]
    proto = build([node("If", ["g"], "y", then_branch=bodies[0], else_branch=bodies[1])], {"x": [2]}, ["y"])
    proto.graph.input.append(helper.make_tensor_value_info("g", TensorProto.BOOL, []))
    after, entry = apply(proto, ConstantsToInitializers())
    assert len(entry.changes) == 2
    assert [len(a.g.initializer) for a in after.graph.node[0].attribute] == [1, 1]
    assert run(after, X | {"g": np.array(True)})["y"].tolist() == [3, 0]


def test_what_stays_says_why() -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "v"), numpy_helper.from_array(np.array([1], np.int64), "i"), [2]
    )
    documented = node("Constant", [], "d", value_float=1.0)
    documented.doc_string = "why"
    nodes = [
        node("Constant", [], "s", sparse_value=sparse),
        node("Constant", [], "z", value_float=1.0),
        documented,
        node("Add", ["x", "s"], "a"),
        node("Add", ["a", "d"], "y"),
    ]
    proto = build(nodes, {"x": [2]}, ["y", "z"])
    after, entry = apply(proto, ConstantsToInitializers(), verify="off")
    assert ops(after) == ops(proto)
    assert "sparse" in reasons(entry)["n_s"]
    assert "output" in reasons(entry)["n_z"]
    assert "documented" in reasons(entry)["n_d"]


def test_ir3_is_left_whole() -> None:
    nodes = [node("Constant", [], "k", value=numpy_helper.from_array(np.float32(1))), node("Add", ["x", "k"], "y")]
    proto = build(nodes, {"x": [2]}, ["y"], opset=8, ir_version=3)
    after, entry = apply(proto, ConstantsToInitializers())
    assert after == proto
    assert "IR version 3" in reasons(entry)["(graph)"]
