"""The whole road of a conversion with a real framework, the one that is light enough to be in every test run."""

from __future__ import annotations

import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import run_cli, run_process
from test_schema import check


def classes(model: str | Path, rows: np.ndarray) -> np.ndarray:
    """The labels that a converted classifier gives, one row at a time."""
    session = onnxruntime.InferenceSession(str(model))
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(["label"], {name: row[None]})[0] for row in rows])


def test_a_pipeline(estimators: Path, workplace: Path) -> None:
    import skops.io

    ran = run_cli("convert", estimators / "linear.skops", "-o", "m.onnx", "--json")
    assert ran.code == 0, ran.err
    check(ran.json, "converted")
    assert ran.json["source"]["framework"].startswith("scikit-learn ")
    assert max(o["max_abs"] for o in ran.json["comparison"]["outputs"]) < 1e-4
    rows = np.load(estimators / "test_flat.npz")["X"]
    theirs = skops.io.load(estimators / "linear.skops").predict(rows)
    assert np.array_equal(classes("m.onnx", rows), theirs)


def test_through_a_pipe_to_int8_with_the_accuracy_kept(estimators: Path, workplace: Path) -> None:
    """``convert ... -o - | quantize -``, as a shell runs it."""
    graphopt = shlex.join([sys.executable, "-m", "graphopt"])
    command = (
        f"{graphopt} convert {estimators}/mlp.skops -o - -q | {graphopt} quantize - -o int8.onnx --data "
        f"{estimators}/calib_flat.npz --allow-slower --time 0 -q"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    test = np.load(estimators / "test_flat.npz")
    assert np.mean(classes("int8.onnx", test["X"]) == test["label"]) > 0.9


def test_a_pickle_takes_a_word(estimators: Path, workplace: Path) -> None:
    ran = run_process("convert", str(estimators / "linear.pkl"), "-o", "m.onnx")
    assert ran.code == 2
    assert "--allow-pickle" in ran.error
    assert run_cli("convert", estimators / "linear.pkl", "-o", "m.onnx", "--allow-pickle", "-q").code == 0


def test_from_an_address_to_an_address(estimators: Path, workplace: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/zoo/linear.skops", (estimators / "linear.skops").read_bytes())
    ran = run_cli("convert", "memory://zoo/linear.skops", "-o", "memory://zoo/linear.onnx", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["input"]["path"], ran.json["source"]["kind"]) == ("memory://zoo/linear.skops", "skops")
    assert len(fsspec.filesystem("memory").cat_file("/zoo/linear.onnx")) == ran.json["output"]["bytes"]
    assert list(workplace.iterdir()) == []


def test_hostile_pickles_run_nothing(workplace: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(workplace / 'ran')!r}, 'w')",)

    Path("evil.pkl").write_bytes(pickle.dumps(Payload()))
    ran = run_cli("convert", "evil.pkl", "-o", "m.onnx")
    assert ran.code == 2
    assert "--allow-pickle" in ran.error
    assert [p.name for p in workplace.iterdir()] == ["evil.pkl"]


def test_a_foreign_class_in_a_skops_file_is_not_loaded(workplace: Path) -> None:
    import skops.io
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    sys.path.insert(0, str(workplace))
    Path("theirs.py").write_text("def double(x):\n    return 2 * x\n")
    try:
        import theirs

        skops.io.dump(make_pipeline(FunctionTransformer(theirs.double)), "odd.skops")
    finally:
        sys.path.remove(str(workplace))
        sys.modules.pop("theirs", None)
    ran = run_cli("convert", "odd.skops", "-o", "m.onnx")
    assert ran.code == 2
    assert "theirs.double" in ran.error
    assert not Path("m.onnx").exists()


def test_texts_want_some_rows(workplace: Path) -> None:
    import skops.io
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["good food", "bad food", "good wine", "bad service", "so good", "very bad"]
    skops.io.dump(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [1, 0, 1, 0, 1, 0]), "t.skops")
    assert "--data rows.npz" in run_cli("convert", "t.skops", "-o", "m.onnx").error
    np.savez("rows.npz", text=np.array(texts))
    ran = run_cli("convert", "t.skops", "-o", "m.onnx", "--data", "rows.npz", "-q")
    assert ran.code == 0, ran.err
    session = onnxruntime.InferenceSession("m.onnx")
    found = session.run(["label"], {session.get_inputs()[0].name: np.array([["bad wine"]], object)})[0]
    assert found.tolist() == [0]


def test_an_interpreter_without_the_packages(estimators: Path, workplace: Path) -> None:
    bare = Path("bare")
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -I "$@"\n')
    bare.chmod(0o755)
    ran = run_cli("convert", estimators / "linear.skops", "-o", "m.onnx", "--python", "./bare")
    assert ran.code == 2
    assert "bare has no " in ran.error
    assert "-m pip install scikit-learn skl2onnx skops onnx" in ran.error
