"""Layers as matrices, and the moments of what they read: against the runtime itself and against plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import helper

from graphopt.gram import collect_inputs, sample_inputs, squared_error
from graphopt.linear import Form, form_of, from_matrix, to_matrix
from graphopt.model import load
from graphopt.session import Session
from tests.builders import model, value, weight

Array = npt.NDArray[Any]
ALL = 1 << 20

CONVS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((5, 4, 3, 3), {}),
    "pointwise": ((5, 4, 1, 1), {}),
    "grouped": ((6, 2, 3, 3), {"group": 2}),
    "depthwise": ((8, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "strided": ((5, 4, 3, 2), {"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    "dilated": ((5, 4, 3, 3), {"dilations": [2, 1], "pads": [2, 1, 0, 1]}),
    "same-upper": ((5, 4, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same-lower": ((5, 4, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ((5, 4, 3, 3), {"auto_pad": "VALID"}),
    "one-dim": ((5, 4, 3), {"strides": [2], "pads": [1, 2]}),
    "three-dims": ((5, 4, 2, 1, 3), {"pads": [1, 0, 1, 0, 0, 1]}),
}
TRANSPOSED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((4, 5, 3, 3), {}),
    "strided": ((4, 5, 3, 4), {"strides": [2, 3], "pads": [1, 1, 0, 2]}),
    "grouped": ((4, 3, 3, 3), {"group": 2, "strides": [2, 2], "output_padding": [1, 0]}),
    "dilated": ((4, 5, 3, 3), {"dilations": [2, 1], "strides": [1, 2]}),
    "shaped": ((4, 5, 3, 3), {"strides": [2, 2], "output_shape": [11, 15]}),
}


def layer(op: str, data: tuple[int | str, ...], stored: Array, **attributes: Any) -> tuple[ir.Model, ir.Node]:
    """One layer that reads the input ``x``."""
    node = helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)
    loaded = load(model([node], [value("x", data)], [value("y", None)], [weight("w", stored)]))
    return loaded, loaded.graph[0]


def check(loaded: ir.Model, node: ir.Node, stored: Array, x: Array, y_rows: Any) -> None:
    """Rows times the matrix is what the runtime computes, and H is the sum of their outer products."""
    form = form_of(node)
    assert form is not None
    rows = form.columns(x, len(x), ALL).transpose(0, 2, 1)
    matrix = to_matrix(node, stored)
    np.testing.assert_array_equal(from_matrix(node, matrix, stored.shape).astype(np.float32), stored)
    y = Session(loaded).run({"x": x})["y"]
    np.testing.assert_allclose(np.matmul(rows, matrix.transpose(0, 2, 1)), y_rows(y, form), rtol=1e-4, atol=1e-5)
    seen = collect_inputs(loaded, [form], [{"x": x[i : i + 1]} for i in range(len(x))], rows=ALL)[form]
    assert seen.count == rows.shape[1]
    by_hand = np.zeros((form.groups, form.width, form.width))
    for group in range(form.groups):
        for row in rows[group].astype(np.float64):
            by_hand[group] += np.outer(row, row)
    np.testing.assert_allclose(seen.gram, by_hand, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen.total, rows.sum(axis=1, dtype=np.float64), rtol=1e-5, atol=1e-5)


def spatial(y: Array, form: Form) -> Array:
    """[N, outputs, positions...] -> [groups, N * positions, outputs of a group]."""
    split = y.reshape(len(y), form.groups, y.shape[1] // form.groups, -1)
    return split.transpose(1, 0, 3, 2).reshape(form.groups, -1, split.shape[2])


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_a_matrix_over_its_patches(name: str) -> None:
    shape, attributes = CONVS[name]
    rng = np.random.default_rng(0)
    stored = rng.standard_normal(shape).astype(np.float32)
    sizes = (7, 6, 5)[: len(shape) - 2]
    x = rng.standard_normal((3, 4, *sizes)).astype(np.float32)
    loaded, node = layer("Conv", ("N", 4, *sizes), stored, **attributes)
    check(loaded, node, stored, x, spatial)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_too(name: str) -> None:
    shape, attributes = TRANSPOSED[name]
    rng = np.random.default_rng(0)
    stored = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((2, 4, 5, 7)).astype(np.float32)
    loaded, node = layer("ConvTranspose", ("N", 4, 5, 7), stored, **attributes)
    check(loaded, node, stored, x, spatial)


def flat(y: Array, form: Form) -> Array:
    return y.reshape(1, -1, y.shape[-1])


def test_matmul_and_gemm() -> None:
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((6, 5)).astype(np.float32)
    x = rng.standard_normal((3, 4, 6)).astype(np.float32)
    check(*layer("MatMul", ("N", 4, 6), stored), stored, x, flat)
    check(*layer("Gemm", ("N", 6), stored, alpha=0.5), stored, x[:, 0], flat)
    check(*layer("Gemm", ("N", 6), stored.T.copy(), transB=1), stored.T.copy(), x[:, 0], flat)


def test_gemm_that_transposes_its_data() -> None:
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((6, 5)).astype(np.float32)
    x = rng.standard_normal((6, 4)).astype(np.float32)
    loaded, node = layer("Gemm", (6, 4), stored, transA=1, alpha=2.0)
    form = form_of(node)
    assert form is not None
    rows = form.columns(x, 1, ALL).transpose(0, 2, 1)
    y = Session(loaded).run({"x": x})["y"]
    np.testing.assert_allclose(rows[0] @ to_matrix(node, stored)[0].T, y, rtol=1e-5)


def test_a_batch_of_matrices() -> None:
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((3, 6, 5)).astype(np.float32)
    x = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
    loaded, node = layer("MatMul", ("N", 3, 4, 6), stored)
    check(loaded, node, stored, x, lambda y, form: y.transpose(1, 0, 2, 3).reshape(3, -1, 5))


def test_what_is_no_layer_has_no_form() -> None:
    stored = np.ones((5, 1, 6, 5), np.float32)
    assert form_of(layer("MatMul", ("N", 5, 2, 4, 6), stored)[1]) is None  # which rows it meets depends on the data
    _, node = layer("MatMul", ("N", 6), np.ones(6, np.float32))
    assert form_of(node) is None
    assert form_of(load(model([helper.make_node("Relu", ["x"], ["y"])], [value("x")], [value("y")])).graph[0]) is None


def two_layers(width: int = 24) -> ir.Model:
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["y"], name="second"),
    ]
    weights = {"w1": rng.standard_normal((width, 3, 3, 3)), "w2": rng.standard_normal((4, width, 3, 3))}
    initializers = [weight(n, w) for n, w in weights.items()]
    return load(model(nodes, [value("x", ("N", 3, 20, 20))], [value("y", None)], initializers))


def forms(loaded: ir.Model) -> list[Form]:
    return [f for node in loaded.graph if (f := form_of(node)) is not None]


def batches(x: Array, size: int) -> list[dict[str, Array]]:
    return [{"x": x[i : i + size]} for i in range(0, len(x), size)]


@pytest.mark.parametrize("size", [2, 5, 10])
def test_batch_size_and_order_do_not_matter(size: int) -> None:
    loaded = two_layers()
    x = np.random.default_rng(2).standard_normal((10, 3, 20, 20)).astype(np.float32)
    one = collect_inputs(loaded, forms(loaded), batches(x, 1))
    other = collect_inputs(loaded, forms(loaded), batches(x[::-1].copy(), size))
    for form, seen in one.items():
        assert seen.count == other[form].count == 1030  # 103 positions of each
        scale = np.sqrt(np.einsum("gii,gjj->gij", seen.gram, seen.gram))
        assert (np.abs(seen.gram - other[form].gram) <= 1e-6 * scale).all()
        np.testing.assert_allclose(seen.mean, other[form].mean, rtol=1e-5, atol=1e-6)


def test_merging_is_one_sweep_over_both() -> None:
    loaded = two_layers()
    x = np.random.default_rng(2).standard_normal((6, 3, 20, 20)).astype(np.float32)
    whole, first, rest = (
        collect_inputs(loaded, forms(loaded), batches(part, 1), rows=99) for part in (x, x[:2], x[2:])
    )
    for form, seen in first.items():
        seen.merge(rest[form])
        assert seen.count == whole[form].count
        np.testing.assert_allclose(seen.gram, whole[form].gram, rtol=1e-5, atol=1e-4)


def test_beyond_the_cap_it_takes_turns_and_files(tmp_path: Path) -> None:
    loaded = two_layers()
    x = np.random.default_rng(2).standard_normal((3, 3, 20, 20)).astype(np.float32)
    counted = 0

    class Counted:
        def __iter__(self) -> Iterator[dict[str, Array]]:
            nonlocal counted
            counted += 1
            return iter(batches(x, 1))

    whole = collect_inputs(loaded, forms(loaded), batches(x, 1))
    largest = max(f.gram_bytes for f in forms(loaded)) / 2**20
    parts = collect_inputs(loaded, forms(loaded), Counted(), memory_mb=largest, scratch=tmp_path)
    assert counted == 4  # a look at the first sample, one to count them, and two sweeps
    assert all(isinstance(seen.gram, np.memmap) for seen in parts.values())
    assert any(tmp_path.rglob("*.f64"))
    for form, seen in parts.items():
        np.testing.assert_array_equal(seen.gram, whole[form].gram)
    assert set(collect_inputs(loaded, forms(loaded), batches(x, 1), memory_mb=largest / 2)) == {forms(loaded)[0]}


def test_the_quadratic_is_the_error() -> None:
    loaded = two_layers()
    node = loaded.graph[2]
    form = form_of(node)
    assert form is not None
    x = np.random.default_rng(2).standard_normal((4, 3, 20, 20)).astype(np.float32)
    seen = collect_inputs(loaded, [form], batches(x, 2), rows=ALL)[form]
    rows = sample_inputs(loaded, [form], batches(x, 2), most=ALL)[form].astype(np.float64).transpose(0, 2, 1)
    change = np.random.default_rng(3).standard_normal((1, 4, form.width))
    by_rows = np.square(np.matmul(rows, change.transpose(0, 2, 1))).mean(axis=1)
    np.testing.assert_allclose(squared_error(change, seen.second_moment), by_rows, rtol=1e-5)


def test_nan_and_infinity_count_as_zero() -> None:
    loaded, node = layer("MatMul", ("N", 2), np.ones((2, 3), np.float32))
    form = form_of(node)
    assert form is not None
    seen = collect_inputs(loaded, [form], [{"x": np.array([[np.nan, 2.0], [np.inf, 1.0]], np.float32)}])[form]
    np.testing.assert_array_equal(seen.gram, [[[0, 0], [0, 5]]])
