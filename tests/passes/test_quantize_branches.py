"""quantize-static in the branches of an If: integers there too, from what the samples show of each branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import apply, build, node, optimized, reasons, run, sqnr

import graphopt
from graphopt.model import graphs
from graphopt.passes.quantize_static import QuantizeStatic

RNG = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def branch(prefix: str, shape: list[int]) -> onnx.GraphProto:
    """Exp, Conv and bias, Relu, Conv."""
    weights = {
        f"{prefix}_w": normal(8, 3, 3, 3),
        f"{prefix}_b": normal(8),
        f"{prefix}_v": normal(4, 8, 1, 1),
    }
    nodes = [
        node("Tanh", ["x"], f"{prefix}_a"),
        node("Conv", [f"{prefix}_a", f"{prefix}_w", f"{prefix}_b"], f"{prefix}_c"),
        node("Relu", [f"{prefix}_c"], f"{prefix}_r"),
        node("Conv", [f"{prefix}_r", f"{prefix}_v"], f"{prefix}_y"),
    ]
    output = helper.make_tensor_value_info(f"{prefix}_y", TensorProto.FLOAT, shape)
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    return helper.make_graph(nodes, prefix, [], [output], constants)


def net() -> onnx.ModelProto:
    shape = [1, 4, 6, 6]
    proto = build(
        [
            node("ReduceMean", ["x"], "mean", keepdims=0),
            node("Greater", ["mean", "zero"], "go"),
            node("If", ["go"], "y", then_branch=branch("t", shape), else_branch=branch("e", shape)),
        ],
        {"x": [1, 3, 8, 8]},
        {"y": shape},
        {"zero": np.float32(0)},
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def samples(*means: float) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(1, 3, 8, 8) + np.float32(mean)} for mean in means]


def names(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for graph in graphs(proto) for n in graph.node]


@pytest.mark.parametrize("rounding", [True, False])
def test_both_branches_become_integer(rounding: bool, tmp_path: Path) -> None:
    proto = net()
    made, entry = apply(proto, QuantizeStatic(rounding=rounding), data=samples(1, -1, 1, -1, 1, -1))
    onnx.checker.check_model(made, full_check=True)
    assert len(entry.changes) == 4
    for feed in samples(1, -1):
        assert sqnr(run(proto, feed)["y"], run(made, feed)["y"]) > 25
        assert sqnr(run(proto, feed)["y"], run(made, feed, optimize=True)["y"]) > 25
    assert names(optimized(made, tmp_path)).count("QLinearConv") == 4
    assert made.ByteSize() < proto.ByteSize() + 3000
    assert not {t.name for t in made.graph.initializer} & {"t_w_quantized", "e_w_quantized"}  # in their own graph


def test_a_branch_that_no_sample_takes_stays_as_it_is_and_is_named() -> None:
    proto = net()
    made, entry = apply(proto, QuantizeStatic(), data=samples(1, 1, 1))
    assert {c.site for c in entry.changes} == {"n_t_c", "n_t_y"}
    why = reasons(entry)
    assert "calibration never showed" in why["n_e_c"]
    (feed,) = samples(-2)
    np.testing.assert_array_equal(run(proto, feed)["y"], run(made, feed)["y"])


def test_values_of_one_name_in_both_branches_are_not_mixed_up() -> None:
    proto = net()
    conditional: Any = proto.graph.node[2]
    for attribute in conditional.attribute:
        for inner in attribute.g.node:
            for names_ in (inner.input, inner.output):
                names_[:] = [{"t_r": "same", "e_r": "same"}.get(name, name) for name in names_]
    _, entry = apply(proto, QuantizeStatic(), data=samples(1, -1, 1, -1))
    assert not entry.changes
    assert all("values of the same names" in reasons(entry)[site] for site in ("n_t_c", "n_t_y", "n_e_c", "n_e_y"))


def test_measured_placement_says_that_branches_are_not_measured_alone(tmp_path: Path) -> None:
    feeds = samples(*[1, -1] * 8)
    report = graphopt.quantize(
        net(), data=feeds, placement="measured", allow_slower=True, time=0.05, threads=1, seed=0
    ).report
    assert any("stand in branches or bodies" in note for note in report["notes"])
