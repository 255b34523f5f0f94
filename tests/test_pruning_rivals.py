"""tools/bench/pruning.py: rivals' rows are at the share that was asked for, and none ends the table."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import graphopt

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "graphopt" / "demo"
sys.path.insert(0, str(ROOT / "tools" / "bench"))

import pruning  # noqa: E402
from onnx_for_torch import prepare  # noqa: E402


@pytest.fixture(scope="module")
def judge() -> pruning.Judge:
    plain = graphopt.optimize(DEMO / "digits.onnx", time=0, verify="off").ir_model
    _, judging = pruning._context(plain, (DEMO / "calibration.npz", DEMO / "evaluation.npz"))
    return pruning.Judge(plain, judging, "accuracy")


@pytest.mark.parametrize("everywhere", [False, True])
def test_onnxsim_leaves_at_most_what_was_asked_for(judge: pruning.Judge, everywhere: bool) -> None:
    pytest.importorskip("onnxsim")
    much, little, nothing = pruning.onnxsim_cells(judge, ("0.9", "0.5", "0.0001"), everywhere)
    for amount, cell in ((0.9, much), (0.5, little)):
        left = re.fullmatch(r"[01]\.\d{4} \((0\.\d\d), -?\d+\.\d dB\)", cell)
        assert left is not None, cell
        assert amount - 0.05 < float(left[1]) <= amount
    assert nothing.startswith("leaves 0.")


def test_what_onnxsim_raises_is_its_cell(judge: pruning.Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxsim = pytest.importorskip("onnxsim")

    def fail(*_: object, **__: object) -> None:
        raise KeyError("no such chain")

    monkeypatch.setattr(onnxsim, "apply_structured_pruning", fail)
    assert list(pruning.onnxsim_cells(judge, ("0.9", "0.5"), False)) == ["KeyError", "KeyError"]


def test_an_interpreter_without_torch_is_a_cell(judge: pruning.Judge, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    for given, told in ((python, "exit 1"), (tmp_path / "none", "FileNotFoundError")):
        assert list(pruning.torch_cells(str(given), "x", tmp_path, judge, ("0.9", "0.5"))) == [told, told]


def test_prepared_for_onnx2torch_it_computes_the_same() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 13]>
        g (float[1, 2, 6, 7] x) => (float[1, 3] y) {
            a = Conv<auto_pad = "SAME_UPPER", kernel_shape = [2, 3], strides = [1, 1]>(x, w)
            b = MaxPool<auto_pad = "SAME_UPPER", kernel_shape = [2, 2], strides = [1, 1]>(a)
            c = GlobalMaxPool(b)
            y = Reshape(c, target)
        }""")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 2, 2, 3)).astype(np.float32)
    for name, array in (("w", weight), ("target", np.array([0, 3]))):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    ready = prepare(model)
    assert [node.op_type for node in ready.graph.node] == ["Pad", "Conv", "Pad", "MaxPool", "ReduceMax", "Reshape"]
    x = rng.normal(size=(1, 2, 6, 7)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for one in (model, ready)
    )
    np.testing.assert_allclose(before[0], after[0], rtol=1e-6)
