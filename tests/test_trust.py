"""What a user may rely on: again is the same, names and order do not matter, what is said around the graph stays."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS, run_cli
from onnx import helper, numpy_helper
from test_align import renamed

from graphopt.base import Context
from graphopt.errors import RuntimeFailure
from graphopt.ledger import RunResult
from graphopt.manager import PassManager
from graphopt.model import load, to_proto
from graphopt.model_diff import diff
from graphopt.presets import EXACT_PASSES, exact_passes
from graphopt.registry import create
from graphopt.session import Session

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"
FIXTURES = sorted(path.stem for path in MODELS.glob("*.onnx"))


def optimized(proto: onnx.ModelProto, *, whole: bool = False) -> RunResult:
    """What ``optimize`` runs, onnxsim (a slow start) only where the ``whole`` is asked for; numbers are for others."""
    model = load(proto)
    pipeline = exact_passes() if whole else exact_passes()[:1]
    return PassManager(pipeline, verify="off").run(model, Context(original=model, threads=1))


@cache
def result(name: str) -> onnx.ModelProto:
    return to_proto(optimized(onnx.load(MODELS / f"{name}.onnx")).model)


@pytest.mark.parametrize("name", FIXTURES)
def test_again_is_the_same_bytes(name: str) -> None:
    once = result(name)
    again = to_proto(optimized(once).model)
    assert again.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", FIXTURES)
def test_names_and_order_do_not_matter(name: str) -> None:
    other = to_proto(optimized(renamed(onnx.load(MODELS / f"{name}.onnx"), seed=1)).model)
    found = diff(result(name), other)
    assert not found.found, found.as_dict()


@pytest.mark.real
@pytest.mark.parametrize("name", ["magika", "basic-pitch", "silero-vad", "silero-vad-if", "rapidocr-cls"])
def test_the_same_of_real_models(name: str) -> None:
    path = CACHE / name / "model.onnx"
    if not path.is_file():
        pytest.skip(f"{name} is not fetched; run: make models")
    original = onnx.load(path)
    once = to_proto(optimized(original, whole=True).model)
    again = to_proto(optimized(once, whole=True).model)
    assert again.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)
    found = diff(once, to_proto(optimized(renamed(original, seed=1), whole=True).model))
    assert not found.found, found.as_dict()


def said(entries: Iterable[onnx.StringStringEntryProto]) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}


@pytest.mark.parametrize("name", FIXTURES)
def test_what_was_said_around_the_graph_stays(name: str) -> None:
    original, made = onnx.load(MODELS / f"{name}.onnx"), result(name)
    assert list(made.graph.input) == list(original.graph.input)
    assert list(made.graph.output) == list(original.graph.output)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(made, field) == getattr(original, field), field
    assert [(o.domain, o.version) for o in made.opset_import] == [(o.domain, o.version) for o in original.opset_import]
    assert said(made.metadata_props) == said(original.metadata_props)
    assert (made.graph.name, made.graph.doc_string) == (original.graph.name, original.graph.doc_string)
    before = {node.name: node for node in original.graph.node if node.name}
    for node in made.graph.node:
        old = before.get(node.name)
        if old is not None and old.op_type == node.op_type:
            assert node.doc_string == old.doc_string
            assert said(node.metadata_props) == said(old.metadata_props)


def around_the_unknown() -> onnx.ModelProto:
    """Mystery between things to do: an Identity and a constant before it, Reshapes and a size after it."""
    nodes = [
        helper.make_node("Identity", ["x"], ["i"], name="before"),
        helper.make_node("Add", ["one", "one"], ["two"], name="constant"),
        helper.make_node("Mystery", ["i", "two"], ["u"], name="mystery", domain="com.example", level=3),
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "index"], ["k"], name="gather"),
        helper.make_node("Concat", ["k", "rest"], ["t"], name="concat", axis=0),
        helper.make_node("Reshape", ["u", "rest"], ["a"], name="flat"),
        helper.make_node("Reshape", ["a", "t"], ["b"], name="shaped"),
        helper.make_node("Identity", ["b"], ["c"], name="after"),
        helper.make_node("Relu", ["c"], ["y"], name="last"),
    ]
    info = helper.make_tensor_value_info
    stored = {"one": np.ones(2, np.float32), "index": np.array([1]), "rest": np.array([-1])}
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", 1, ["n", 4])],
        [info("y", 1, [4, None])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_everything_around_an_unknown_operator_is_optimized() -> None:
    proto = around_the_unknown()
    with pytest.raises(RuntimeFailure):
        Session(proto)
    made = to_proto(optimized(proto).model)
    assert [n.op_type for n in made.graph.node] == ["Mystery", "Reshape", "Relu"]
    (mystery,) = (n for n in made.graph.node if n.op_type == "Mystery")
    assert mystery == helper.make_node("Mystery", ["x", "two"], ["u"], name="mystery", domain="com.example", level=3)
    stored = {t.name: numpy_helper.to_array(t).tolist() for t in made.graph.initializer}
    assert stored["two"] == [2, 2]
    assert [4, -1] in stored.values()


def test_where_nothing_can_be_compared_the_run_says_so(tmp_path: Path) -> None:
    onnx.save(around_the_unknown(), tmp_path / "m.onnx")
    ran = run_cli("optimize", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--json")
    assert ran.code == 0, ran.err
    assert any("nothing was compared" in note for note in ran.json["notes"])
    ran = run_cli("optimize", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx", "--dim", "n=3", "--json")
    assert ran.code == 0, ran.err
    dims = onnx.load(tmp_path / "f.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [3, 4]


@pytest.mark.parametrize("name", ["encoder", "control", "gru"])
def test_shape_inference_that_fails_ends_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> onnx.ModelProto:
        raise onnx.shape_inference.InferenceError("no idea")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    model = load(MODELS / f"{name}.onnx")
    passes = [create(each, {}) for each in EXACT_PASSES]
    run = PassManager(passes).run(model, Context(original=model, threads=1))
    assert run.reverted == []
    assert any(entry.changes for entry in run.ledger)
