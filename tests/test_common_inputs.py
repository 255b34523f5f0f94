"""compare: inputs that differ between A and B, and outputs that are large."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run_cli
from onnx import TensorProto, helper

from graphopt.validation import OutputDifference


def relu(path: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> None:
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.parametrize("more", [(), ("--layerwise",)])
@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ([1, 4], [1, 5], TensorProto.FLOAT),
        (["n", 4], ["n", 5], TensorProto.FLOAT),
        ([1, 4], [1, 4, 1], TensorProto.FLOAT),
        ([1, 4], [1, 4], TensorProto.DOUBLE),
    ],
)
def test_other_inputs_are_one_clear_line(
    workplace: Path, a: list[int | str], b: list[int | str], kind: int, more: tuple[str, ...]
) -> None:
    relu("a.onnx", a)
    relu("b.onnx", b, kind)
    ran = run_cli("compare", "a.onnx", "b.onnx", *more)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("error: input 'x' is float32[")
    assert "in A and float" in ran.err
    assert "ONNX Runtime" not in ran.err


@pytest.mark.parametrize("more", [(), ("--layerwise",)])
def test_random_samples_have_the_sizes_that_either_model_fixes(workplace: Path, more: tuple[str, ...]) -> None:
    relu("a.onnx", ["n", 4])
    relu("b.onnx", [2, "m"])
    ran = run_cli("compare", "a.onnx", "b.onnx", *more)
    assert ran.code == 0, ran.err
    assert "identical" in ran.out


def test_samples_that_b_does_not_take_are_named(workplace: Path) -> None:
    relu("a.onnx", ["n", 4])
    relu("b.onnx", [2, 4])
    np.savez("d.npz", x=np.zeros((3, 3, 4), np.float32))  # three samples of [3, 4]
    ran = run_cli("compare", "a.onnx", "b.onnx", "--data", "d.npz")
    assert ran.code == 2
    assert ran.err.startswith("error: sample 0: input 'x' has shape [3, 4], and B takes float32[2,4]; give --data")


def test_a_large_output_is_compared_in_pieces() -> None:
    a = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    b = a.copy()
    b[4095, 7] += 0.5
    b[17, 3] = a[17, 3] = np.nan
    found = OutputDifference("y")
    tracemalloc.start()
    try:
        found.add(a, b)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < a.nbytes  # its float64 copies alone would be five times as much
    assert found.max_abs == pytest.approx(0.5)
    assert found.mismatch is None
    assert found.agreement is not None
    assert found.agreement >= 4095 / 4096
    rest = a.ravel()[np.isfinite(a.ravel())].astype(np.float64)
    assert found.sqnr == pytest.approx(10 * np.log10(rest @ rest / 0.25), abs=1e-5)
