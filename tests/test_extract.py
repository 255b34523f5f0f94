"""``graphopt extract``: a piece of a model computes, bit for bit, what the whole computes there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from builders import OPSET, chain, conditional, function_model, mlp, model, parsed, sparse, value, weight
from onnx import TensorProto, helper

from graphopt.cli import run
from graphopt.errors import InputError
from graphopt.extraction import by_onnx_ir, cut_out
from graphopt.graph import is_op
from graphopt.model import load, to_proto
from graphopt.session import Session
from graphopt.storage import save

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "graphopt" / "demo" / "digits.onnx"
FIXTURES = {path.stem: path for path in sorted((ROOT / "fixtures" / "models").glob("*.onnx"))}
RUNNABLE = {name: path for name, path in FIXTURES.items() if name != "custom"} | {"digits": DIGITS}

Arrays = dict[str, npt.NDArray[Any]]


def data(name: str) -> Arrays:
    path = ROOT / "graphopt" / "demo" / "calibration.npz" if name == "digits" else ROOT / f"fixtures/data/{name}.npz"
    with np.load(path, allow_pickle=False) as stored:
        return {key: array[:1] for key, array in stored.items()}


def inner(whole: ir.Model) -> list[str]:
    """Values that can be cut at: made by a node of the main graph from something."""
    made = [v.name for node in whole.graph for v in node.outputs if not is_op(node, "Constant") and v.name]
    return [name for name in made if name not in {o.name for o in whole.graph.outputs}]


def completed(whole: ir.Model, first: str, outputs: list[str]) -> list[str] | None:
    """``first`` and what the error says is also needed; None where ``first`` leads to no output at all."""
    try:
        cut_out(whole, [first], outputs)
    except InputError as error:
        if "can be computed without" in str(error):
            return None
        also = re.search(r"also needs: (.*)$", str(error))
        return [first, *(also[1].split(", ") if also else ["?"])]
    return [first]


def assert_same(piece: ir.Model, feeds: Arrays, expected: Arrays) -> None:
    onnx.checker.check_model(to_proto(piece), full_check=True)
    found = Session(piece, optimize=False, threads=1).run(feeds)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_pieces_of_every_fixture_compute_the_same_bits(name: str) -> None:
    whole = load(RUNNABLE[name])
    feeds, names = data(name), inner(whole)
    outputs = [o.name or "" for o in whole.graph.outputs]
    values = Session(whole, optimize=False, threads=1, taps=names).run(feeds) | feeds
    every = max(1, len(names) // 12)
    tried = 0
    for cut in names[::every]:
        before, _ = cut_out(whole, None, [cut])
        assert_same(before, feeds, values)
        inputs = completed(whole, cut, outputs[:1])
        if inputs is None:
            continue
        after, _ = cut_out(whole, inputs, outputs[:1])
        assert {v.name for v in after.graph.inputs if not v.is_initializer()} == set(inputs)
        assert_same(after, {k: values[k] for k in inputs}, values)
        tried += 1
    assert tried


@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_both_engines_cut_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(RUNNABLE[name])
    names = inner(whole)
    middle = names[len(names) // 2]
    one, _ = cut_out(whole, None, [middle])
    monkeypatch.setattr("graphopt.extraction._by_graphsurgeon", lambda *_: None)
    other, _ = cut_out(whole, None, [middle])
    assert [(n.op_type, [v.name for v in n.outputs]) for n in one.graph] == [
        (n.op_type, [v.name for v in n.outputs]) for n in other.graph
    ]
    assert set(one.graph.initializers) == set(other.graph.initializers)


def test_a_residual_block_needs_its_other_branch() -> None:
    whole = load(DIGITS)
    inside, after = "/block1/conv2/Conv_output_0", "/block1/act2/Relu_output_0"
    with pytest.raises(InputError, match=r"also needs: /act/Relu_output_0$"):
        cut_out(whole, [inside], [after])
    piece, notes = cut_out(whole, [inside, "/act/Relu_output_0"], [after])
    assert [node.op_type for node in piece.graph] == ["BatchNormalization", "Add", "Relu"]
    assert not notes
    assert piece.graph.inputs[0].type == ir.TensorType(ir.DataType.FLOAT)
    assert piece.graph.inputs[0].shape is not None


def test_what_leads_nowhere_needs_the_inputs_of_the_model() -> None:
    proto = parsed(
        "agraph (float[2] a, float[2] b) => (float[2] y, float[2] z) { y = Relu(a)  t = Neg(b)  z = Abs(t) }"
    )
    with pytest.raises(InputError, match=r"also needs: b$"):
        cut_out(load(proto), ["a"], ["y", "z"])
    with pytest.raises(InputError, match="'z' can be computed without 'a'; leave it out"):
        cut_out(load(proto), ["t", "a"], ["z"])


def test_captured_values_come_along_and_may_be_cut_at() -> None:
    whole = load(conditional(3))
    piece, _ = cut_out(whole, ["v1", "c"], ["v2"])
    feeds = {"v1": np.array([-1, 2], np.float32), "c": np.array(True)}
    assert_same(piece, feeds, {"v2": np.array([0, 2], np.float32)})
    with pytest.raises(InputError, match="also needs: c"):
        cut_out(whole, ["v1"], ["v2"])


def test_one_output_of_a_node_can_be_fed_while_the_other_is_computed() -> None:
    proto = parsed("agraph (float[4] x) => (float[2] y) { a, b = Split<num_outputs=2>(x)  y = Sub(a, b) }")
    piece, _ = cut_out(load(proto), ["a", "x"], ["y"])
    feeds = {"a": np.array([10, 20], np.float32), "x": np.array([1, 2, 3, 4], np.float32)}
    assert_same(piece, feeds, {"y": np.array([7, 16], np.float32)})


def test_functions_that_are_called_come_along() -> None:
    proto = function_model()
    proto.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    proto.graph.output[0].name = "z"
    with_it, _ = cut_out(load(proto), None, ["y"])
    assert len(with_it.functions) == 1
    assert_same(with_it, {"x": np.ones(2, np.float32)}, {"y": np.array([2, 3], np.float32)})
    without, _ = cut_out(load(proto), ["y"], ["z"])
    assert not without.functions
    with pytest.raises(InputError, match="'k' is inside function 'AddK'"):
        cut_out(load(proto), None, ["k"])


def test_metadata_and_doc_strings_stay() -> None:
    whole = load(FIXTURES["metadata"])
    first = inner(whole)[1]
    piece, _ = cut_out(whole, None, [first])
    before, after = to_proto(whole), to_proto(piece)
    for field in ("doc_string", "domain", "model_version", "producer_name", "ir_version"):
        assert getattr(after, field) == getattr(before, field)
    assert list(after.metadata_props) == list(before.metadata_props)
    assert after.graph.doc_string == before.graph.doc_string
    nodes = {n.name: n for n in before.graph.node}
    assert all(n == nodes[n.name] for n in after.graph.node)
    infos = {v.name: v for v in (*before.graph.input, *before.graph.value_info)}
    for info in (*after.graph.input, *after.graph.value_info):
        assert info == infos[info.name]


def test_what_graphsurgeon_cannot_carry_is_cut_by_onnx_ir() -> None:
    nodes = [helper.make_node("Add", ["x", "s"], ["a"]), helper.make_node("Neg", ["a"], ["y"])]
    proto = model(nodes, [value("x", (4,))], [value("y", (4,))])
    proto.graph.sparse_initializer.append(sparse())
    piece, _ = cut_out(load(proto), None, ["a"])
    assert [t.values.name for t in to_proto(piece).graph.sparse_initializer] == ["s"]


def test_custom_operators_are_no_obstacle(tmp_path: Path) -> None:
    whole = load(FIXTURES["custom"])
    mystery = next(node for node in whole.graph if node.op_type == "MysteryOp")
    before, _ = cut_out(whole, None, [mystery.inputs[0].name or ""])
    Session(before, threads=1).run(data("custom"))
    name = mystery.outputs[0].name or ""
    mystery.outputs[0].type = None
    with pytest.raises(InputError, match=r"the type of .* is not known"):
        cut_out(whole, [name], None)


def test_weights_that_can_be_overridden_come_along() -> None:
    whole = load(FIXTURES["overridable"])
    piece, _ = cut_out(whole, None, [inner(whole)[0]])
    defaults = [v.name for v in piece.graph.inputs if v.is_initializer()]
    assert defaults
    assert set(defaults) < {v.name for v in whole.graph.inputs}


def test_external_weights_stay_external_and_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    save(load(mlp(64)), path, external=True)
    out = tmp_path / "piece.onnx"
    assert run(["extract", str(path), "--outputs", "a", "-o", str(out)]) == 0
    piece = onnx.load(out, load_external_data=False)
    assert [t.name for t in piece.graph.initializer] == ["w1"]
    assert piece.graph.initializer[0].data_location == TensorProto.EXTERNAL


def test_the_original_is_not_touched() -> None:
    proto = mlp()
    before = proto.SerializeToString()
    whole = load(proto)
    names = [v.name for node in whole.graph for v in node.outputs]
    cut_out(whole, ["h"], ["a"])
    assert [v.name for node in whole.graph for v in node.outputs] == names
    assert [v.name for v in whole.graph.inputs] == ["x"]
    assert proto.SerializeToString() == before
    by_onnx_ir(whole, ["x"], ["a"])
    assert to_proto(whole) == to_proto(load(proto))


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["www1"], ["y"], r"no value is called 'www1' \(in the main graph\); did you mean"),
        (["zzzzzzz"], ["y"], "graphopt inspect --nodes"),
        (["h"], ["h"], "'h' is both an input and an output"),
        (["h"], ["x"], "'x' is an input of the model, so no node makes it"),
        (None, ["w1"], "'w1' is a weight, so no node makes it"),
        (["w1"], ["y"], "'w1' is a weight, and weights come along by themselves; leave it out"),
        (["first"], ["y"], "'first' is a node, and cuts are made at values; it makes: h"),
        (["h", "x"], ["y"], "'y' can be computed without 'x'; leave it out of --inputs"),
        (["a"], ["h"], "'h' can be computed without 'a'; leave it out of --inputs"),
        ([], ["y"], "no inputs are named"),
        ("h", ["y"], "inputs is one string"),
    ],
)
def test_errors_say_what_to_give_instead(inputs: Any, outputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        cut_out(load(mlp()), inputs, outputs)
    assert "\n" not in str(caught.value)


def test_values_inside_bodies_are_told_apart() -> None:
    whole = load(conditional())
    with pytest.raises(InputError, match=r"'out' is inside a body of If 'if0', .* cut at what that node makes: v1"):
        cut_out(whole, ["out"], ["v1"])


def test_types_that_nobody_declares_are_inferred_or_computed() -> None:
    piece, _ = cut_out(load(chain(4)), ["v1"], ["v3"])
    assert piece.graph.inputs[0].type == ir.TensorType(ir.DataType.FLOAT)
    nodes = [
        helper.make_node("Gelu", ["x"], ["a"], domain="com.microsoft"),
        helper.make_node("Cast", ["a"], ["y"], to=TensorProto.INT64),
    ]
    proto = model(nodes, [value("x")], [value("y", (2,), TensorProto.INT64)], domains=["com.microsoft"])
    piece, _ = cut_out(load(proto), ["a"], ["y"])
    assert piece.graph.inputs[0].type == ir.TensorType(ir.DataType.FLOAT)


def test_the_verb_writes_the_piece_and_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub.onnx"
    cut = "/block1/conv2/Conv_output_0,/act/Relu_output_0"
    code = run(["extract", str(DIGITS), "--inputs", cut, "--outputs", "/block1/act2/Relu_output_0", "-o", str(out)])
    text = capsys.readouterr().out
    assert code == 0
    assert "3 of 49 nodes" in text
    assert "/block1/conv2/Conv_output_0" in text
    assert len(onnx.load(out).graph.node) == 3
    assert run(["extract", str(DIGITS), "--outputs", "/act/Relu_output", "-o", str(out)]) == 2
    assert "did you mean '/act/Relu_output_0'?" in capsys.readouterr().err


def test_names_may_hold_commas(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a,b"]), helper.make_node("Neg", ["a,b"], ["y"])]
    path = tmp_path / "m.onnx"
    path.write_bytes(model(nodes, [value("x")], [value("y")], [weight("w", [1.0])], opset=OPSET).SerializeToString())
    assert run(["extract", str(path), "--inputs", "a,b", "-o", str(tmp_path / "s.onnx"), "--json"]) == 0
    assert [v.name for v in onnx.load(tmp_path / "s.onnx").graph.input] == ["a,b"]
