"""remove-unused: what nobody reads goes, with a record; what somebody may feed or fetch stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import MODELS, apply, build, initializers, node, ops, reasons, run

from graphopt.passes.remove_unused import RemoveUnused


def test_dead_chains_and_weights_go_and_are_listed() -> None:
    proto = build(
        [node("Neg", ["x"], "y"), node("Mul", ["x", "w"], "d1"), node("Abs", ["d1"], "d2")],
        {"x": [4], "unread": [2]},
        ["y"],
        {"w": np.ones(4, np.float32), "loose": np.ones(9, np.float32)},
    )
    made, entry = apply(proto, RemoveUnused())
    assert ops(made) == ["Neg"]
    assert not made.graph.initializer
    assert {c.site for c in entry.changes} == {"n_d1", "n_d2", "w", "loose"}
    assert [v.name for v in made.graph.input] == ["x", "unread"]


def test_overridable_initializers_and_outputs_stay() -> None:
    proto = build(
        [node("Neg", ["x"], "y")],
        {"x": [4]},
        ["y"],
        {"w": np.ones(4, np.float32)},
        ir_version=3,
        opset=8,
        inputs_too=True,
    )
    made, entry = apply(proto, RemoveUnused())
    assert "w" in initializers(made)
    assert [v.name for v in made.graph.input] == ["x", "w"]
    assert "is used" in reasons(entry)["(graph)"]


def test_an_initializer_that_is_an_output_stays() -> None:
    proto = build([node("Neg", ["x"], "y")], {"x": [4]}, ["y", "w"], {"w": np.ones(4, np.float32)})
    made, _ = apply(proto, RemoveUnused())
    assert "w" in initializers(made)
    np.testing.assert_array_equal(run(made, {"x": np.ones(4, np.float32)})["w"], np.ones(4))


def test_bodies_are_cleaned_and_what_only_they_read_stays() -> None:
    info = helper.make_tensor_value_info
    branch = [
        helper.make_graph(
            [node("Mul", ["x", "w"], f"o{i}"), node("Neg", ["x"], f"dead{i}")],
            f"b{i}",
            [],
            [info(f"o{i}", TensorProto.FLOAT, [4])],
        )
        for i in (0, 1)
    ]
    proto = build(
        [node("If", ["c"], "y", then_branch=branch[0], else_branch=branch[1])],
        {"x": [4]},
        ["y"],
        {"w": np.ones(4, np.float32), "c": np.array(True)},
    )
    made, entry = apply(proto, RemoveUnused())
    assert {c.site for c in entry.changes} == {"n_dead0", "n_dead1"}
    assert "w" in initializers(made)
    run(made, {"x": np.ones(4, np.float32)})


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_fixtures_keep_interface_and_a_second_run_changes_nothing(path: object) -> None:
    proto = onnx.load(str(path))
    made, _ = apply(proto, RemoveUnused())
    assert list(made.graph.output) == list(proto.graph.output)
    assert [v.name for v in made.graph.input] == [v.name for v in proto.graph.input]
    again, entry = apply(made, RemoveUnused())
    assert not entry.changes
    assert again.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


def test_what_only_a_removed_body_read_goes_at_once() -> None:
    """onnx-ir leaves the bodies of a removed node registered as readers (found by tools/fuzz.py, graph 542)."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Add", ["state", "a"], "next"), node("Identity", ["go"], "on")],
        "body",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("state", TensorProto.FLOAT, None)],
        [info("on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, None)],
    )
    proto = build(
        [node("Mul", ["x", "w"], "a"), node("Neg", ["x"], "y"), node("Loop", ["n", "c", "x"], "dead", body=body)],
        {"x": [4]},
        ["y"],
        {"w": np.ones(4, np.float32), "n": np.int64(2), "c": np.bool_(True)},
    )
    made, entry = apply(proto, RemoveUnused())
    assert ops(made) == ["Neg"]
    assert not made.graph.initializer
    assert {"n_dead", "n_a", "w", "n", "c"} <= {c.site for c in entry.changes}
    again, second = apply(made, RemoveUnused())
    assert second.status == "unchanged"
    assert again == made
