"""``graphopt prune --sparsity`` and the pass behind it: zeros where they were asked for, and no more promised."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, run_cli
from test_schema import check

import graphopt
from graphopt.base import PassResult
from graphopt.errors import InputError, NothingDone
from graphopt.passes._masks import Pattern, smallest, sparse_on_gram
from graphopt.registry import create

Watch = Callable[[Path], AbstractContextManager[None]]
DIGITS = DEMO / "digits.onnx"
SAMPLES: dict[str, Any] = {
    "data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "metric": "accuracy", "time": 0,
    "threads": 1,
}  # fmt: skip
PACKS = importlib.util.find_spec("zstandard") is not None


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """The weight of every layer of the main graph that has zeros put in, by the layer's operator and number."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in constants]
    found = {f"{n.op_type} {n.name}": constants[n.input[1]] for n in nodes}
    return {name: array for name, array in found.items() if array.size >= 1024}


def test_half_of_the_connections_go_and_the_accuracy_stays() -> None:
    plain = graphopt.prune(DIGITS, sparsity=0.7, **{**SAMPLES, "data": None})
    repaired = graphopt.prune(DIGITS, sparsity=0.7, **SAMPLES)
    for result in (plain, repaired):
        entry = result.report["ledger"][-1]
        assert entry["pass"] == "sparsify"
        assert 0.69 < entry["metrics"]["zeros_share"] < 0.71
        big = [array for array in weights(result.model).values() if np.mean(array == 0) > 0.01]
        assert len(big) == entry["metrics"]["layers_sparsified"] == 7
        assert all(abs(np.mean(array == 0) - 0.7) < 0.01 for array in big)
    assert plain.report["ledger"][-1]["metrics"]["layer_error"] is None
    before, after = repaired.report["ledger"][-1]["metrics"]["layer_error"]
    assert after < 0.5 * before
    accuracy = [result.report["metric"]["candidate"] for result in (plain, repaired)]
    assert accuracy[1] > accuracy[0] + 0.2
    assert accuracy[1] > repaired.report["metric"]["original"] - 0.02


def test_two_of_four_input_channels_stay_at_every_place_of_the_kernel() -> None:
    result = graphopt.prune(DIGITS, sparsity="2:4", **SAMPLES)
    looked = 0
    for name, array in weights(result.model).items():
        if np.mean(array == 0) < 0.01:
            continue
        rows = np.moveaxis(array, 1, -1) if name.startswith("Conv") else array
        if name.startswith("MatMul"):
            rows = array.T
        width = rows.shape[-1] // 4 * 4
        quads = (rows[..., :width] == 0).reshape(*rows.shape[:-1], -1, 4).sum(-1)
        assert (quads == 2).all(), name
        looked += 1
    assert looked >= 6
    assert any("sparse tensor cores" in note for note in result.report["notes"])


def test_the_report_says_what_zeros_bring(workplace: Path) -> None:
    ran = run_cli(
        "prune", DIGITS, "-o", "s.onnx", "--data", DEMO / "calibration.npz", "--sparsity", "0.5", "--time", "0.2"
    )
    assert ran.code == 0, ran.err
    assert "zeros: 110,976 of 221,952 weights in 7 layers (50.0 %)" in ran.out
    assert "multiplies by zeros as by other numbers" in ran.out
    assert "depthwise convolution" in ran.out
    if PACKS:
        lines = ran.out.replace("\n", " ")
        assert "packed for transport" in lines
        report = run_cli(
            "prune", DIGITS, "-o", "s.onnx", "--sparsity", "0.9", "--time", "0", "--data", DEMO / "calibration.npz",
            "--json",
        ).json  # fmt: skip
        before, after = report["ledger"][-1]["metrics"]["packed_bytes"]
        assert after < 0.4 * before
        check(report, "made")


USAGE = {
    "nonsense": (["--sparsity", "most"], "--sparsity is 'most'; give the share of zeros"),
    "all": (["--sparsity", "1.0"], "--sparsity is '1.0'"),
    "4:2": (["--sparsity", "4:2"], "--sparsity is '4:2'"),
    "macs": (["--sparsity", "0.5", "--macs", "0.7"], "--macs is about whole channels"),
    "latency": (["--sparsity", "0.5", "--latency", "0.7"], "--latency is about whole channels"),
    "repair": (["--sparsity", "0.5", "--repair", "none"], "--repair is about whole channels"),
    "dry-run": (["--sparsity", "0.5", "--dry-run"], "--sparsity has none"),
    "exclude": (["--sparsity", "0.5", "--exclude", "no_such_node"], "matches no node"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_that_is_wrong(name: str, workplace: Path, untouched: Watch) -> None:
    arguments, fragment = USAGE[name]
    with untouched(workplace):
        ran = run_cli("prune", DIGITS, *([] if name == "dry-run" else ["-o", "o.onnx"]), *arguments)
    assert ran.code == 2, ran.out
    assert fragment in ran.error


def test_nothing_to_take_is_no_success() -> None:
    with pytest.raises(NothingDone, match="not included"):
        graphopt.prune(DIGITS, sparsity=0.5, include=["Relu"], time=0)
    with pytest.raises(InputError, match="one string"):
        graphopt.prune(DIGITS, sparsity=0.5, include="Conv", time=0)
    with pytest.raises(InputError, match="give the share"):
        graphopt.prune(DIGITS, sparsity=True, time=0)


def test_as_a_step_of_a_recipe_zeros_stay_zero_in_integers() -> None:
    steps = [create("sparsify", {"sparsity": "2:4"}), create("quantize-static", {})]
    before = graphopt.optimize(DIGITS, time=0).model
    result = graphopt.optimize(before, passes=steps, **SAMPLES, min_sqnr=1)
    assert [entry["status"] for entry in result.report["ledger"]] == ["changed", "changed"]
    integers = [
        a for t in result.model.graph.initializer
        if (a := onnx.numpy_helper.to_array(t)).dtype == np.int8 and a.ndim > 1 and a.size >= 2048
    ]  # fmt: skip
    assert integers
    for array in integers:
        quads = (np.moveaxis(array, 1, -1) == 0).reshape(-1, 4).sum(-1) if array.shape[1] % 4 == 0 else None
        assert quads is None or (quads >= 2).all()
    assert result.report["metric"]["candidate"] > 0.97


@pytest.mark.parametrize("text", ["0.25", "1:2", "2:4", "4:6"])
def test_the_update_is_better_than_the_mask_alone(text: str) -> None:
    """On correlated inputs; and never worse than settling allows: the zeros are where the mask says."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 24, 600)) + 2 * rng.normal(size=(8, 1, 600))
    gram, matrix = x @ x.transpose(0, 2, 1) / 600, rng.normal(size=(8, 5, 24))
    pattern = Pattern.parse(text)
    found, gone = sparse_on_gram(matrix, gram, pattern, 12)
    assert (found[gone] == 0).all()
    assert np.mean(gone) == pytest.approx(pattern.share, abs=0.01)
    plain = np.where(smallest(np.abs(matrix), pattern, 12), 0, matrix)

    def error(w: np.ndarray[Any, Any]) -> float:
        return float(np.square((w - matrix) @ x).mean())

    assert error(found) < 0.5 * error(plain)
    only = np.where(gone, 0.0, matrix)
    for group in range(8):  # least squares of each row on what is left of it
        for row in range(5):
            left = ~gone[group, row]
            h = gram[group] + 0.01 * np.diagonal(gram[group]).mean() * np.eye(24)
            only[group, row, left] = np.linalg.solve(h[np.ix_(left, left)], (h @ matrix[group, row])[left])
    assert error(found) < 1.3 * error(only)


def test_the_caller_s_model_is_left_alone() -> None:
    model = onnx.load(DIGITS)
    before = model.SerializeToString()
    graphopt.prune(model, sparsity="2:4", time=0)
    assert model.SerializeToString() == before
    assert PassResult().modified is False
