"""quantize-static in the bodies of Loop and Scan: integers there too, from what every turn showed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import apply, build, node, optimized, reasons, run, sqnr

from graphopt.model import graphs
from graphopt.passes.quantize_static import QuantizeStatic

WIDTH, TURNS = 24, 3
FLOAT, BOOL, INT = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def normal(*shape: int) -> np.ndarray:
    """Weights under which a state neither dies nor saturates."""
    return (1.3 * np.random.default_rng(5).normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)


def info(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def cell(prefix: str = "") -> list[onnx.NodeProto]:
    """state -> next: two layers and a Tanh; one reads what comes into the body, one's weight is from outside."""
    p = prefix
    return [
        node("MatMul", [f"{p}state", f"{p}w"], f"{p}m"),
        node("Add", [f"{p}m", f"{p}b"], f"{p}a"),
        node("Relu", [f"{p}a"], f"{p}r"),
        node("MatMul", [f"{p}r", "v"], f"{p}u"),
        node("Tanh", [f"{p}u"], f"{p}next"),
    ]


def constants(prefix: str = "") -> list[onnx.TensorProto]:
    arrays = {f"{prefix}w": normal(WIDTH, WIDTH), f"{prefix}b": normal(WIDTH)}
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def loop_body(nodes: list[onnx.NodeProto], shape: tuple[int | str, ...] = (2, WIDTH)) -> onnx.GraphProto:
    go = node("Identity", ["go"], "on")
    inputs = [info("turn", INT), info("go", BOOL), info("state", FLOAT, *shape)]
    outputs = [info("on", BOOL), info("next", FLOAT, *shape), info("next", FLOAT, *shape)]
    kept = node("Identity", ["next"], "kept")
    outputs[2].name = "kept"
    return helper.make_graph([go, *nodes, kept], "body", inputs, outputs, constants())


def loop(body: onnx.GraphProto, *, state: tuple[int | str, ...] = (2, WIDTH)) -> onnx.ModelProto:
    """y, the last state, and all of them."""
    proto = build(
        [node("Loop", ["turns", "", "x"], ["y", "states"], body=body)],
        {"x": (2, WIDTH)},
        {"y": state, "states": (TURNS, *state)},
        {"turns": np.int64(TURNS), "v": normal(WIDTH, WIDTH)},
    )
    onnx.checker.check_model(proto)
    return proto


def scan(**attributes: object) -> onnx.ModelProto:
    add = node("Add", ["step", "before"], "state")
    inputs = [info("before", FLOAT, 2, WIDTH), info("step", FLOAT, 2, WIDTH)]
    outputs = [info("next", FLOAT, 2, WIDTH), info("kept", FLOAT, 2, WIDTH)]
    kept = node("Identity", ["next"], "kept")
    body = helper.make_graph([add, *cell(), kept], "body", inputs, outputs, constants())
    return build(
        [node("Scan", ["zero", "x"], ["y", "states"], body=body, num_scan_inputs=1, **attributes)],
        {"x": (TURNS, 2, WIDTH)},
        {"y": (2, WIDTH), "states": (TURNS, 2, WIDTH)},
        {"zero": np.zeros((2, WIDTH), np.float32), "v": normal(WIDTH, WIDTH)},
    )


def samples(proto: onnx.ModelProto, count: int = 12) -> list[dict[str, np.ndarray]]:
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(count)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def operators(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for graph in graphs(proto) for n in graph.node]


LOOPS = {
    "loop": loop(loop_body(cell())),
    "scan": scan(),
    "scan, backwards": scan(scan_output_directions=[1]),
    "scan, along another axis": scan(scan_output_axes=[0]),
}


@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("kind", LOOPS)
def test_the_body_becomes_integer(kind: str, rounding: bool, tmp_path: Path) -> None:
    proto = LOOPS[kind]
    made, entry = apply(proto, QuantizeStatic(rounding=rounding), data=samples(proto))
    onnx.checker.check_model(made)
    assert {c.site for c in entry.changes} >= {"n_m", "n_u"}
    for feed in samples(proto, 3):
        for name, wanted in run(proto, feed).items():
            assert sqnr(wanted, run(made, feed)[name]) > 20
            assert sqnr(wanted, run(made, feed, optimize=True)[name]) > 20
    assert not {"MatMul", "Gemm"} & set(operators(optimized(made, tmp_path)))
    assert list(made.graph.node[-1].output) == ["y", "states"]  # nothing of what calibration added


def test_the_range_is_that_of_all_turns() -> None:
    """A state that doubles with every turn: its range is that of the last, not of the first."""
    proto = loop(loop_body([node("MatMul", ["state", "w"], "m"), node("Add", ["state", "state"], "next")]))
    data = [{"x": np.ones((2, WIDTH), np.float32)}] * 4
    made, entry = apply(proto, QuantizeStatic(observer="min-max"), data=data)
    (change,) = [c for c in entry.changes if c.site == "n_m"]
    assert f"input range [0, {2 ** (TURNS - 1)}]" in change.detail
    assert made.ByteSize() != proto.ByteSize()


def test_a_body_that_is_never_entered_stays_as_it_is() -> None:
    proto = loop(loop_body(cell()))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.int64(0), "turns"))
    _, entry = apply(proto, QuantizeStatic(), data=samples(proto))
    assert not entry.changes
    assert all("calibration never showed" in why for why in reasons(entry).values())


def test_a_value_of_another_size_in_each_turn_is_left_alone() -> None:
    grows = [
        node("MatMul", ["state", "w"], "m"),
        node("ReduceSum", ["m"], "s", keepdims=1),
        node("Concat", ["state", "state"], "next", axis=0),
        node("Identity", ["s"], "kept"),
    ]
    body = helper.make_graph(
        [node("Identity", ["go"], "on"), *grows],
        "body",
        [info("turn", INT), info("go", BOOL), info("state", FLOAT, "n", WIDTH)],
        [info("on", BOOL), info("next", FLOAT, "n", WIDTH), info("kept", FLOAT, 1, 1)],
        constants(),
    )
    proto = build(
        [node("Loop", ["turns", "", "x"], ["y", "states"], body=body), node("MatMul", ["x", "v"], "z")],
        {"x": (2, WIDTH)},
        {"y": ("n", WIDTH), "states": (TURNS, 1, 1), "z": (2, WIDTH)},
        {"turns": np.int64(TURNS), "v": normal(WIDTH, WIDTH)},
    )
    _, entry = apply(proto, QuantizeStatic(), data=samples(proto))
    assert {c.site for c in entry.changes} == {"n_z"}
    assert "calibration never showed" in reasons(entry)["n_m"]


def test_a_branch_within_a_loop_is_left_alone_with_the_reason() -> None:
    def branch(name: str) -> onnx.GraphProto:
        nodes = [node("Tanh", ["state"], f"{name}_t"), node("MatMul", [f"{name}_t", "v"], f"{name}_y")]
        return helper.make_graph(nodes, name, [], [info(f"{name}_y", FLOAT, 2, WIDTH)])

    choice = node("If", ["go"], "next", then_branch=branch("then"), else_branch=branch("else"))
    proto = loop(loop_body([choice]))
    _, entry = apply(proto, QuantizeStatic(), data=samples(proto))
    assert not entry.changes
    assert all("not every turn of a loop takes" in why for why in reasons(entry).values())


def test_loops_within_loops() -> None:
    inner = helper.make_graph(
        [node("Identity", ["i_go"], "i_on"), *cell("i_")],
        "inner",
        [info("i_turn", INT), info("i_go", BOOL), info("i_state", FLOAT, 2, WIDTH)],
        [info("i_on", BOOL), info("i_next", FLOAT, 2, WIDTH)],
        constants("i_"),
    )
    outer = loop_body([node("Loop", ["turns", "", "state"], ["next"], body=inner)])
    proto = loop(outer)
    made, entry = apply(proto, QuantizeStatic(weights="s8"), data=samples(proto))
    assert {c.site for c in entry.changes} >= {"n_i_m", "n_i_u"}
    for feed in samples(proto, 3):
        assert sqnr(run(proto, feed)["y"], run(made, feed, optimize=True)["y"]) > 15  # after 9 turns
