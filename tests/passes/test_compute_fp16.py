"""compute-fp16: what computes in float16, what stays in float32 and why, and that nobody outside notices."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, run_cli
from onnx import TensorProto, helper
from support import MODELS, apply, build, fixture_feeds, initializers, node, ops, reasons, run, size

import graphopt
from graphopt.errors import PreconditionError
from graphopt.model import load
from graphopt.passes.compute_fp16 import ComputeFp16

WIDTH = 48


def rows(scale: float = 1.0, count: int = 8) -> list[dict[str, np.ndarray]]:
    data = np.random.default_rng(0).standard_normal((count, 4, WIDTH)).astype(np.float32)
    return [{"x": row * np.float32(scale)} for row in data]


def weights(**more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {**{f"w{i}": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 7 for i in range(3)}, **more}


def layers(**more: Any) -> onnx.ModelProto:
    """Three products, the second one's result times a thousand thousand, and back."""
    nodes = [
        node("MatMul", ["x", "w0"], "a"),
        node("Relu", ["a"], "b"),
        node("MatMul", ["b", "w1"], "c"),
        node("Mul", ["c", "large"], "d"),
        node("Div", ["d", "large"], "e"),
        node("MatMul", ["e", "w2"], "y"),
    ]
    return build(nodes, {"x": ("n", WIDTH)}, {"y": ("n", WIDTH)}, weights(large=np.float32(1e6)), **more)


def types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value that the file tells."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}


def close(proto: onnx.ModelProto, made: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], least: float = 50) -> None:
    for feed in feeds[:3]:
        wanted, found = run(proto, feed), run(made, feed)
        for name, value in wanted.items():
            assert value.dtype == found[name].dtype
            noise = np.square(value - found[name], dtype=np.float64).sum()
            assert noise <= np.square(value, dtype=np.float64).sum() / 10 ** (least / 10), name


def test_an_island_stays_in_float_where_a_range_does_not_fit() -> None:
    proto = layers()
    made, entry = apply(proto, ComputeFp16(), data=rows())
    found = types(made)
    assert [found[n] for n in ("x", "d", "y")] == [TensorProto.FLOAT] * 3
    kinds = {n.output[0]: n.op_type for n in made.graph.node}
    products = [n for n in made.graph.node if n.op_type == "MatMul"]
    assert all(found[n.output[0]] == TensorProto.FLOAT16 for n in products)
    assert {"Mul", "Div", "Relu"} < set(kinds.values())
    told = reasons(entry)
    assert set(told) == {"n_d", "n_e"}
    assert "float16 ends at 65504" in told["n_d"]
    assert {array.dtype for name, array in initializers(made).items() if name.startswith("w")} == {np.dtype(np.float16)}
    assert entry.metrics["casts"] == ops(made).count("Cast") == 4
    assert size(made) < 0.6 * size(proto)
    close(proto, made, rows())


def test_what_inputs_bring_decides_too() -> None:
    proto = layers()
    _, entry = apply(proto, ComputeFp16(margin=1), data=rows(1e4))
    assert "n_a" not in reasons(entry)
    _, entry = apply(proto, ComputeFp16(margin=16), data=rows(1e4))
    assert "'x' reaches" in reasons(entry)["n_a"]
    _, entry = apply(proto, ComputeFp16(), data=rows(1e-7))
    assert "few digits" in reasons(entry)["n_a"]


def test_masks_small_constants_and_sums_stay() -> None:
    nodes = [
        node("MatMul", ["x", "w0"], "a"),
        node("Add", ["a", "mask"], "masked"),
        node("Softmax", ["masked"], "p", axis=-1),
        node("MatMul", ["p", "w1"], "b"),
        node("ReduceMean", ["b"], "m", axes=[-1], keepdims=1),
        node("Add", ["b", "epsilon"], "c"),
        node("Add", ["c", "m"], "e"),
        node("MatMul", ["e", "w2"], "y"),
    ]
    mask = np.where(np.arange(WIDTH) < 40, 0, -3.4e38).astype(np.float32)
    proto = build(nodes, {"x": ("n", WIDTH)}, ["y"], weights(mask=mask, epsilon=np.float32(1e-12)))
    made, entry = apply(proto, ComputeFp16(), data=rows())
    told = reasons(entry)
    assert "'mask' reaches 3.4e+38" in told["n_masked"]
    assert "'masked'" in told["n_p"]
    assert "adds up inside" in told["n_m"]
    assert "'epsilon' stays below" in told["n_c"]
    close(proto, made, rows(), 45)


def test_a_caller_sees_the_same_inputs_and_outputs() -> None:
    """Also where an output is read further on, an input is an output's neighbour, and a body reads what is float16."""
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "a"], ["then"])], "b", [], [helper.make_tensor_value_info("then", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["else"])], "b", [], [helper.make_tensor_value_info("else", 1, None)]
    )
    nodes = [
        node("MatMul", ["x", "w0"], "a"),
        node("MatMul", ["a", "w1"], "z"),
        node("ReduceSum", ["x"], "s", keepdims=0),
        node("Less", ["s", "zero"], "below"),
        node("If", ["below"], "y", then_branch=body, else_branch=other),
    ]
    shapes = dict.fromkeys(("a", "y", "z"), ("n", WIDTH))
    proto = build(nodes, {"x": ("n", WIDTH)}, shapes, weights(zero=np.float32(0)), opset=17)
    made, entry = apply(proto, ComputeFp16(), data=rows())
    assert [o.name for o in made.graph.output] == [o.name for o in proto.graph.output]
    assert "(bodies)" in reasons(entry)
    assert "runs a body" in reasons(entry)["n_y"]
    close(proto, made, rows())


def test_a_weight_that_a_caller_may_replace_stays() -> None:
    proto = build([node("MatMul", ["x", "w0"], "y")], {"x": ("n", WIDTH)}, ["y"], weights(), inputs_too=True)
    made, entry = apply(proto, ComputeFp16(), data=rows())
    assert "may be replaced by a caller" in reasons(entry)["n_y"]
    assert ops(made) == ["MatMul"]


def test_nodes_can_be_left_out_and_lonely_ones_are() -> None:
    proto = build([node("Relu", ["x"], "a"), node("Neg", ["a"], "y")], {"x": ("n", WIDTH)}, ["y"])
    made, _ = apply(proto, ComputeFp16(), data=rows())
    assert ops(made) == ["Cast", "Relu", "Neg", "Cast"]
    made, entry = apply(proto, ComputeFp16(exclude=("Neg",)), data=rows())
    assert ops(made) == ["Relu", "Neg"]
    assert "two Casts" in reasons(entry)["n_a"]
    assert "was excluded" in reasons(entry)["n_y"]
    _, entry = apply(layers(), ComputeFp16(include=("n_a",)), data=rows())
    assert [c.site for c in entry.changes] == ["n_a"]
    with pytest.raises(ValueError, match="margin"):
        ComputeFp16(margin=0.5)


def test_it_needs_data_and_an_opset() -> None:
    with pytest.raises(PreconditionError, match="calibration data"):
        apply(layers(), ComputeFp16())
    with pytest.raises(PreconditionError, match="opset"):
        ComputeFp16().check(load(layers(opset=8, ir_version=4)))


@pytest.mark.parametrize("name", ["encoder", "lstm", "shared", "opset11"])
def test_every_kind_of_model_comes_back_valid(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    proto, feeds = onnx.load(path), fixture_feeds(name, 6)
    made, entry = apply(proto, ComputeFp16(), data=feeds)
    onnx.checker.check_model(made, full_check=True)
    assert entry.changes or entry.skipped
    close(proto, made, feeds, 35)


def test_the_verb_says_what_it_did(workplace: Any) -> None:
    data = ["--data", DEMO / "calibration.npz", "--eval-data", DEMO / "evaluation.npz", "--metric", "accuracy"]
    arguments = ["compress", DEMO / "digits.onnx", "-o", "out.onnx", "--weights", "fp16-compute", "--time", "0.1"]
    ran = run_cli(*arguments, *data, "--max-drop", "1%", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["output"]["bytes"] < 0.55 * ran.json["input"]["bytes"]
    assert ran.json["output"]["bytes_by_type"]["float16"] > 400_000
    assert any("nodes compute in float16" in note for note in ran.json["notes"])
    assert any("of the original's time" in n or "only shrinks" in n for n in ran.json["notes"])
    assert graphopt.compare(DEMO / "digits.onnx", "out.onnx", min_sqnr=45).report["exit_code"] == 0
    ran = run_cli(*arguments)
    assert ran.code == 2
    assert "--data" in ran.error
    ran = run_cli(*arguments, *data[:2], "--rounding", "nearest")
    assert ran.code == 2
