"""simplify: onnxsim's answer whole or not at all, and what it loses put back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import DEMO, MODELS, apply, build, fixture_feeds, node, ops, reasons, run, size

from graphopt.errors import PreconditionError
from graphopt.passes.simplify import Simplify

RNG = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def wasteful(**options: object) -> onnx.ModelProto:
    """Transposes that cancel."""
    proto = build(
        [
            node("Transpose", ["x"], "a", perm=[1, 0]),
            node("Transpose", ["a"], "b", perm=[1, 0]),
            node("MatMul", ["b", "w"], "y"),
        ],
        {"x": ["batch", 8]},
        {"y": ["batch", 8]},
        {"w": normal(8, 8)},
        **options,  # type: ignore[arg-type]
    )
    proto.doc_string, proto.domain, proto.model_version, proto.producer_name = "doc", "com.me", 7, "me"
    proto.graph.doc_string = "graph doc"
    proto.graph.input[0].doc_string = "input doc"
    proto.graph.node[2].doc_string = "node doc"
    helper.set_model_props(proto, {"author": "me"})
    entry = proto.graph.node[2].metadata_props.add()
    entry.key, entry.value = "where", "there"
    return proto


def test_what_is_around_the_graph_is_kept() -> None:
    proto = wasteful()
    made, entry = apply(proto, Simplify())
    assert ops(made) == ["MatMul"]
    assert entry.changes[0].detail == "3 -> 1 nodes"
    for field in ("ir_version", "doc_string", "domain", "model_version", "producer_name", "producer_version"):
        assert getattr(made, field) == getattr(proto, field)
    assert list(made.metadata_props) == list(proto.metadata_props)
    assert list(made.opset_import) == list(proto.opset_import)
    assert list(made.graph.input) == list(proto.graph.input)
    assert list(made.graph.output) == list(proto.graph.output)
    assert made.graph.doc_string == "graph doc"
    assert made.graph.node[0].doc_string == "node doc"
    assert list(made.graph.node[0].metadata_props) == list(proto.graph.node[2].metadata_props)
    feeds = {"x": normal(3, 8)}
    np.testing.assert_allclose(run(made, feeds)["y"], run(proto, feeds)["y"], rtol=1e-6)


def test_where_it_removes_nothing_the_model_is_left() -> None:
    proto = build([node("MatMul", ["x", "w"], "y")], {"x": [1, 8]}, {"y": [1, 8]}, {"w": normal(8, 8)})
    made, entry = apply(proto, Simplify())
    assert not entry.changes
    assert "removes nothing more" in reasons(entry)["(graph)"]
    assert made.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


def test_bigfold_does_not_grow() -> None:
    proto = onnx.load(MODELS / "bigfold.onnx")
    made, entry = apply(proto, Simplify())
    assert size(made) <= size(proto) + 1024
    assert entry.changes or "grow" in reasons(entry)["(graph)"] or "nothing more" in reasons(entry)["(graph)"]


def test_ir3_models_stay_valid_ir3() -> None:
    weight = node("Constant", [], "w", value=numpy_helper.from_array(normal(8, 8)))
    proto = build(
        [
            weight,
            node("Transpose", ["x"], "a", perm=[1, 0]),
            node("Transpose", ["a"], "b", perm=[1, 0]),
            node("MatMul", ["b", "w"], "y"),
        ],
        {"x": [3, 8]},
        {"y": [3, 8]},
        opset=9,
        ir_version=3,
    )
    made, entry = apply(proto, Simplify())
    assert entry.changes
    assert made.ir_version == 3
    onnx.checker.check_model(made)
    feeds = {"x": normal(3, 8)}
    np.testing.assert_allclose(run(made, feeds)["y"], run(proto, feeds)["y"], rtol=1e-6)


def test_initializers_that_can_be_overridden_stay() -> None:
    proto = onnx.load(MODELS / "overridable.onnx")
    made, _ = apply(proto, Simplify())
    assert [v.name for v in made.graph.input] == [v.name for v in proto.graph.input]
    given = {v.name for v in proto.graph.input}
    assert {t.name for t in made.graph.initializer} >= {t.name for t in proto.graph.initializer if t.name in given}
    feeds = fixture_feeds("overridable", 1)[0]
    np.testing.assert_allclose(run(made, feeds)["logits"], run(proto, feeds)["logits"], rtol=1e-4, atol=1e-5)


FAKES = {
    "killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    "crash": ("raise RuntimeError('no such shape')", "no such shape"),
    "hang": ("import time\ntime.sleep(60)", "longer than"),
    "other interface": ("model.graph.input[0].name = model.graph.node[0].input[0] = 'z'", "inputs or outputs"),
    "other opset": ("model.opset_import[0].version = 11", "opset"),
    "nonsense": ("model.graph.node[-1].input[0] = 'nothing'", "dropped"),
    "larger": (
        "from onnx import numpy_helper\nimport numpy as np\n"
        "model.graph.initializer.append(numpy_helper.from_array(np.ones(9999), 'big'))",
        "file would grow",
    ),
}


@pytest.mark.parametrize("case", FAKES)
def test_a_bad_onnxsim_leaves_the_model_as_it_was(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, expected = FAKES[case]
    body = "".join(f"    {line}\n" for line in code.splitlines())
    prune = (
        "    del model.graph.node[0]\n    model.graph.node[0].input[0] = 'x'\n"  # one node fewer, same numbers or not
    )
    (tmp_path / "onnxsim.py").write_text(f"def simplify(model, check_n=0):\n{prune}{body}    return model, True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    proto = wasteful()
    made, entry = apply(proto, Simplify(timeout=3.0), verify="off")
    assert not entry.changes
    assert expected in reasons(entry)["(graph)"]
    assert made.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


def test_a_wrong_answer_is_reverted_by_the_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.base import Context
    from graphopt.manager import PassManager
    from graphopt.model import load, to_proto

    (tmp_path / "onnxsim.py").write_text(
        "def simplify(model, check_n=0):\n"
        "    del model.graph.node[:2]\n    model.graph.node[0].op_type = 'MatMul'\n"
        "    model.graph.node[0].input[0] = 'x'\n"
        "    model.graph.initializer[0].raw_data = bytes(4 * 64)\n    return model, True\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = load(wasteful())
    result = PassManager([Simplify()]).run(model, Context(original=model, threads=1))
    assert "reverted" in result.ledger[0].status
    assert ops(to_proto(result.model)) == ["Transpose", "Transpose", "MatMul"]


def test_models_in_data_files_are_left_to_our_own_passes(tmp_path: Path) -> None:
    proto = wasteful()
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    with pytest.raises(PreconditionError, match="data file"):
        apply(str(tmp_path / "m.onnx"), Simplify())


def test_digits_twice_is_once() -> None:
    made, _ = apply(str(DEMO / "digits.onnx"), Simplify())
    again, entry = apply(made, Simplify())
    assert not entry.changes
    assert again.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


def test_initializers_that_lose_their_place_among_the_inputs_are_a_reason_to_drop_it() -> None:
    """onnxsim keeps the weight and takes it off the inputs (found by tools/fuzz.py, graph 9059)."""
    proto = build(
        [node("Conv", ["x", "k"], "c", kernel_shape=[1, 1]), node("Add", ["c", "b"], "y")],
        {"x": ["n", 2, 3, 3]},
        ["y"],
        {"k": normal(2, 2, 1, 1), "b": normal(2, 1, 1)},
    )
    proto.graph.input.append(helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, [2, 2, 1, 1]))
    made, entry = apply(proto, Simplify(), verify="off")
    assert [v.name for v in made.graph.input] == ["x", "k"]
    assert entry.status == "unchanged"


def test_a_gelu_is_not_broken_for_one_node_less() -> None:
    """onnxsim folds the last Mul of a Gelu into the Conv behind it; ONNX Runtime then fuses none of the rest."""
    proto = build(
        [
            node("Conv", ["x", "w"], "h"),
            node("Div", ["h", "root"], "d"),
            node("Erf", ["d"], "e"),
            node("Add", ["e", "one"], "a"),
            node("Mul", ["h", "a"], "m"),
            node("Mul", ["m", "half"], "g"),
            node("Conv", ["g", "v"], "y"),
        ],
        {"x": [1, 4, 6, 6]},
        {"y": [1, 4, 6, 6]},
        {
            "w": normal(4, 4, 1, 1),
            "v": normal(4, 4, 1, 1),
            "root": np.float32(2**0.5),
            "one": np.float32(1),
            "half": np.float32(0.5),
        },
    )
    made, entry = apply(proto, Simplify())
    assert ops(made) == ops(proto)
    assert "fuse less of it" in reasons(entry)["(graph)"]
