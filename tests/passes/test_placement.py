"""Where Q/DQ pairs stand: the rules, without weights or data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from support import build, node

from graphopt.graph import label
from graphopt.model import load
from graphopt.passes._patterns import matches
from graphopt.passes._placement import Placement, place
from graphopt.target import get_target

RNG = np.random.default_rng(5)
IMAGE = [1, 4, 8, 8]


def placed(nodes: list[Any], outputs: list[str], **options: Any) -> Placement:
    """The placement of a network whose k1, k2, ... are 1x1 kernels over 4 channels."""
    names = {name for n in nodes for name in n.input}
    weights: dict[str, Any] = {k: RNG.normal(size=(4, 4, 1, 1)).astype(np.float32) for k in names if k[0] == "k"}
    weights |= {"shape": np.array([0, 1, 2, 3])} if "shape" in names else {}
    weights |= {"row": np.ones(8, np.float32), "m": np.ones((8, 8), np.float32)} if "m" in names else {}
    model = load(build(nodes, {"x": IMAGE}, outputs, weights))
    return place(model, get_target("ort-cpu"), **options)


def names(values: Any) -> set[str]:
    return {v.name for v in values}


def conv(source: str, weight: str, output: str) -> Any:
    return node("Conv", [source, weight], output)


def test_the_result_is_rounded_behind_the_relu_and_not_before() -> None:
    found = placed([conv("x", "k1", "c"), node("Relu", ["c"], "y")], ["y"])
    assert names(found.quantized) == {"x", "y"}
    assert names(found.integer) == {"y"}


def test_not_behind_a_relu_that_is_not_the_only_reader() -> None:
    found = placed([conv("x", "k1", "c"), node("Relu", ["c"], "r"), node("Add", ["r", "c"], "y")], ["y"])
    assert names(found.quantized) == {"x", "c"}


def test_a_matmul_may_leave_a_float_result() -> None:
    found = placed([node("MatMul", ["x", "m"], "y")], ["y"])
    assert names(found.quantized) == {"x"}


def test_operators_that_move_values_share_the_scale() -> None:
    found = placed(
        [conv("x", "k1", "a"), node("MaxPool", ["a"], "b", kernel_shape=[2, 2]), conv("b", "k2", "y")], ["y"]
    )
    source = {v.name: s.name for v, s in found.quantized.items()}
    assert source["b"] == "a"
    assert [label(n) for n in found.light] == ["n_b"]


def test_a_chain_of_them_shares_it_to_the_end() -> None:
    found = placed(
        [
            conv("x", "k1", "a"),
            node("Transpose", ["a"], "b", perm=[0, 1, 3, 2]),
            node("MaxPool", ["b"], "c", kernel_shape=[1, 1]),
            conv("c", "k2", "y"),
        ],
        ["y"],
    )
    assert {v.name: s.name for v, s in found.quantized.items()} == {"x": "x", "a": "a", "b": "a", "c": "a", "y": "y"}


def test_a_reshape_to_a_computed_shape_is_bridged() -> None:
    nodes = [
        conv("x", "k1", "a"),
        node("Shape", ["x"], "s"),
        node("Reshape", ["a", "s"], "b"),
        conv("b", "k2", "y"),
    ]
    assert [label(n) for n in placed(nodes, ["y"]).light] == ["n_b"]


def test_a_residual_add_is_integer_when_both_sides_and_a_reader_are() -> None:
    nodes = [conv("x", "k1", "a"), node("Add", ["a", "x"], "s"), node("Relu", ["s"], "r"), conv("r", "k2", "y")]
    found = placed(nodes, ["y"])
    assert [label(n) for n in found.light] == ["n_s"]
    assert names(found.quantized) == {"x", "a", "r", "y"}
    assert not found.skipped_light


def test_light_operators_left_out_say_why() -> None:
    nodes = [
        conv("x", "k1", "a"),
        node("Sigmoid", ["a"], "f"),
        node("Add", ["a", "f"], "mixed"),
        node("GlobalAveragePool", ["a"], "ends"),
        node("Add", ["a", "k9"], "constant"),
    ]
    found = placed(nodes, ["mixed", "ends", "constant"])
    why = {s.site: s.reason for s in found.skipped_light}
    assert "not everything it reads" in why["n_mixed"]
    assert "nothing that runs in integers reads" in why["n_ends"]
    assert "constant" in why["n_constant"]


def test_arithmetic_on_shapes_is_not_reported() -> None:
    nodes = [
        conv("x", "k1", "a"),
        node("Shape", ["a"], "s"),
        node("Gather", ["s", "shape"], "some", axis=0),
        node("Add", ["some", "s"], "twice"),
        node("Cast", ["twice"], "y", to=TensorProto.FLOAT),
    ]
    assert not placed(nodes, ["y"]).skipped_light


def test_exclude_holds_for_light_operators_too() -> None:
    nodes = [conv("x", "k1", "a"), node("Add", ["a", "x"], "s"), conv("s", "k2", "y")]
    found = placed(nodes, ["y"], exclude=("Add",))
    assert not found.light
    assert "excluded by the user" in found.skipped_light[0].reason


def test_the_row_added_to_a_product_belongs_to_the_layer() -> None:
    found = placed([node("MatMul", ["x", "m"], "p"), node("Add", ["row", "p"], "y")], ["y"])
    (layer,) = found.layers
    assert layer.adder is not None
    assert layer.bias_site == (layer.adder, 0)
    assert not found.skipped_light
    found = placed([node("MatMul", ["x", "m"], "p"), node("Add", ["row", "p"], "y")], ["y", "p"])
    assert found.layers[0].adder is None


def test_without_layers_nothing_is_placed() -> None:
    found = placed([node("Add", ["x", "x"], "y")], ["y"])
    assert not found.layers
    assert not found.quantized
    assert not found.light
    assert not found.skipped_light


def test_values_never_seen_take_their_layers_out() -> None:
    nodes = [conv("x", "k1", "a"), node("Sigmoid", ["a"], "f"), conv("f", "k2", "y")]
    found = placed(nodes, ["y"], unseen={"f"})
    assert [label(layer.node) for layer in found.layers] == ["n_a"]
    assert "finite" in found.skipped[0].reason
    assert not placed(nodes, ["y"], unseen={"x", "y"}).layers


def test_the_order_of_values_is_that_of_the_graph() -> None:
    nodes = [conv("x" if i == 0 else f"v{i - 1}", f"k{i}", f"v{i}") for i in range(20)]
    found = placed(nodes, ["v19"])
    assert [v.name for v in found.quantized] == ["x", *[f"v{i}" for i in range(20)]]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("n_a[0]", True),
        ("n_a*", True),
        ("Conv", True),
        ("re:a.0", True),
        ("re:^a", False),
        ("conv", False),
        ("n_a", False),
        ("?_a[[]0]", True),
    ],
)
def test_patterns(pattern: str, expected: bool) -> None:
    model = load(build([conv("x", "k1", "a[0]")], {"x": IMAGE}, ["a[0]"], {"k1": np.ones((4, 4, 1, 1), np.float32)}))
    assert matches(model.graph[0], [pattern]) is expected
