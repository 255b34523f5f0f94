"""What changed between two models: everything that did, once, and nothing that did not."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_align import MODELS, copied, renamed

import graphopt
from graphopt.cli import run
from graphopt.errors import ModelError
from graphopt.model_diff import SECTIONS, Diff, Difference, diff

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "graphopt" / "demo" / "digits.onnx"
Change = Callable[[onnx.ModelProto], None]


def changed(model: onnx.ModelProto, change: Change) -> Diff:
    """The differences after ``change``, everything renamed and shuffled as well."""
    other = copied(model)
    change(other)
    forward, back = diff(model, renamed(other)), diff(renamed(other), model)
    assert forward.differences == back.differences, "B against A has as many differences"
    return forward


def only(found: Diff, section: str) -> Difference:
    """The one difference there is."""
    assert found.differences == 1, found.as_dict()
    (one,) = found.section(section)
    return one


def node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def nudge(tensor: onnx.TensorProto, by: float = 1e-3, at: int = 0) -> None:
    array = numpy_helper.to_array(tensor).copy()
    array.flat[at] += by
    tensor.ClearField("float_data")
    tensor.raw_data = array.tobytes()


def told_apart(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line: renamed and shuffled is no difference; one element of one weight is exactly that."""
    model = onnx.load(path)
    onnx.save(renamed(model), folder / "b.onnx")
    assert run(["diff", str(path), str(folder / "b.onnx")]) == 0
    shown = capsys.readouterr()
    assert "no difference" in shown.out
    assert shown.err == ""
    other = copied(model)
    stored = [t for g in _graphs(other.graph) for t in g.initializer]
    stored += [a.t for g in _graphs(other.graph) for n in g.node if n.op_type == "Constant" for a in n.attribute]
    weights = [t for t in stored if t.data_type == TensorProto.FLOAT and t.dims]
    if not weights:
        return
    nudge(max(weights, key=lambda t: math.prod(t.dims)))
    onnx.save(renamed(other), folder / "b.onnx")
    assert run(["diff", str(path), str(folder / "b.onnx"), "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.err == ""
    report = json.loads(shown.out)
    assert report["differences"] == 1
    (one,) = report["weights"]
    assert (one["kind"], one["elements_differ"]) == ("changed", 1)
    assert one["max_abs"] == pytest.approx(1e-3, rel=1e-2)


class TestNoDifference:
    @pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
    def test_command_line_tells_renamed_from_changed(
        self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told_apart(path, tmp_path, capsys)

    def test_a_model_in_memory_is_not_turned_into_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """That took 10 s for 45 MB of weights, just to see whether the model was '-'."""
        a, b = (ir.from_proto(builders.mlp()) for _ in range(2))
        monkeypatch.setattr(ir.Model, "__str__", lambda _: pytest.fail("the model was printed"))
        assert not diff(a, b).found

    @pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_renamed_and_shuffled(self, path: Path, seed: int) -> None:
        model = onnx.load(path)
        found = diff(model, renamed(model, seed))
        assert not found.found, found.as_dict()
        assert found.renamed["nodes"] == found.aligned["nodes"] + sum(
            1 for g in _graphs(model.graph) for n in g.node if n.op_type == "Constant"
        )
        assert found.renamed["values"]

    def test_names_are_differences_when_asked_for(self) -> None:
        found = diff(builders.mlp(), renamed(builders.mlp()), names=True)
        # three nodes; w1, w2, h, a; the graph
        assert found.differences == len(found.section("names")) == 8

    def test_a_default_spelled_out_is_the_same(self) -> None:
        a = builders.parsed("g (float[2, 2] x) => (float[2, 2] y) { y = Softmax (x) }")
        b = builders.parsed("g (float[2, 2] x) => (float[2, 2] y) { y = Softmax <axis = -1> (x) }")
        assert not diff(a, b).found

    def test_absent_inputs_at_the_end_and_the_two_spellings_of_the_domain(self) -> None:
        a = builders.parsed("g (float[2] x) => (float[2] y) { y = Clip(x) }")
        b = copied(a)
        b.graph.node[0].input.extend(["", ""])
        b.graph.node[0].domain = "ai.onnx"
        assert not diff(a, b).found

    def test_storage_of_the_bytes_does_not_count(self) -> None:
        a, b = builders.mlp(), builders.mlp()
        array = numpy_helper.to_array(b.graph.initializer[0])
        b.graph.initializer[0].CopyFrom(helper.make_tensor("w1", TensorProto.FLOAT, array.shape, array.flatten()))
        assert not b.graph.initializer[0].raw_data
        assert not diff(a, b).found

    def test_dead_twins_are_paired(self) -> None:
        nodes = [helper.make_node("Relu", ["x"], [f"r{i}"]) for i in range(4)]
        nodes += [helper.make_node("Neg", [f"r{i % 2}"], [f"n{i}"]) for i in range(4)]
        model = builders.model(
            [*nodes, helper.make_node("Abs", ["x"], ["y"])], [builders.value("x")], [builders.value("y")]
        )
        assert all(not diff(model, renamed(model, seed)).found for seed in range(5))


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return [graph, *(g for body in inner for g in _graphs(body))]


class TestWeights:
    @pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
    def test_one_element(self, path: Path) -> None:
        model = onnx.load(path)
        tensors = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims]
        constants = [
            n for n in model.graph.node if n.op_type == "Constant" and n.attribute[0].t.data_type == TensorProto.FLOAT
        ]
        if not tensors and not constants:
            pytest.skip("no float weight in it")

        def change(other: onnx.ModelProto) -> None:
            if tensors:
                nudge(next(t for t in other.graph.initializer if t.name == tensors[0].name))
            else:
                nudge(next(n for n in other.graph.node if n.output[0] == constants[0].output[0]).attribute[0].t)

        one = only(changed(model, change), "weights")
        assert one.name == (tensors[0].name if tensors else constants[0].output[0])
        assert one.kind == "changed"
        assert one.data["elements_differ"] == 1
        assert one.data["max_abs"] == pytest.approx(1e-3, rel=1e-2)

    def test_command_line_lists_exactly_that(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = onnx.load(DEMO)
        name = model.graph.initializer[3].name
        nudge(model.graph.initializer[3])
        onnx.save(model, tmp_path / "b.onnx")
        assert run(["diff", str(DEMO), str(tmp_path / "b.onnx")]) == 1
        shown = capsys.readouterr()
        assert shown.err == ""
        assert "1 difference " in shown.out
        (line,) = [line for line in shown.out.splitlines() if line.startswith("changed")]
        assert name in line
        assert "1 of " in line
        assert "max abs 0.001" in line

    def test_type_and_shape(self) -> None:
        def half(other: onnx.ModelProto) -> None:
            array = numpy_helper.to_array(other.graph.initializer[0]).astype(np.float16)
            other.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))

        one = only(changed(builders.mlp(4), half), "weights")
        assert one.edits[0] == ("type", "float32[4, 4]", "float16[4, 4]")
        assert 0 < one.data["max_abs"] < 1e-2

        def wide(other: onnx.ModelProto) -> None:
            other.graph.initializer[0].CopyFrom(builders.weight("w1", np.ones((4, 9))))

        one = only(changed(builders.mlp(4), wide), "weights")
        assert one.edits == (("type", "float32[4, 4]", "float32[4, 9]"),)
        assert one.data["max_abs"] is None

    @pytest.mark.parametrize(
        ("before", "after", "elements", "in_bytes", "largest", "not_finite"),
        [
            (np.float32([1, 0.0]), np.float32([1, -0.0]), 1, 1, 0.0, 0),
            (np.float32([1, 2]), np.float32([np.nan, 3]), 2, 3, 1.0, 1),
            (np.int64([2**62, 1]), np.int64([2**62 + 1, 1]), 1, 1, 1.0, 0),
            (np.uint8([0, 255]), np.uint8([255, 0]), 2, 2, 255.0, 0),
            (np.bool_([True, False]), np.bool_([True, True]), 1, 1, 1.0, 0),
            (np.array(["a", "b"], object), np.array(["a", "c"], object), 1, None, None, 0),
        ],
    )
    def test_numbers(
        self, before: Any, after: Any, elements: int, in_bytes: int | None, largest: float | None, not_finite: int
    ) -> None:
        a, b = (builders.relu() for _ in range(2))
        for model, array in ((a, before), (b, after)):  # read by nothing: still a weight
            model.graph.initializer.append(numpy_helper.from_array(array, "w"))
        data = only(diff(a, b), "weights").data
        assert (data["elements_differ"], data["bytes_differ"]) == (elements, in_bytes)
        assert (data["max_abs"], data["not_finite"]) == (largest, not_finite)

    def test_unshared_is_said_to_be_a_copy(self) -> None:
        model = onnx.load(ROOT / "fixtures" / "models" / "shared.onnx")

        def unshare(other: onnx.ModelProto) -> None:
            users = [n for n in other.graph.node if "both_matrix" in n.input]
            tensor = copied_tensor(next(t for t in other.graph.initializer if t.name == "both_matrix"), "mine")
            other.graph.initializer.append(tensor)
            users[1].input[1] = "mine"

        one = only(changed(model, unshare), "weights")
        assert (one.kind, one.data["copy_of"] is not None) == ("added", True)
        other = copied(model)
        unshare(other)
        assert diff(other, model).section("weights")[0].data["copy_of"] in ("mine", "both_matrix")

    def test_constant_node_instead_of_initializer(self) -> None:
        def move(other: onnx.ModelProto) -> None:
            tensor = other.graph.initializer.pop(0)
            other.graph.node.insert(0, helper.make_node("Constant", [], ["w1"], value=tensor))

        assert only(changed(builders.mlp(), move), "weights").edits == (("stored as", "initializer", "Constant"),)

    def test_sparse(self) -> None:
        def model(value: float) -> onnx.ModelProto:
            add = helper.make_node("Add", ["x", "s"], ["y"])
            made = builders.model([add], [builders.value("x", (4,))], [builders.value("y", (4,))])
            parts = builders.weight("s", [1.0, value]), builders.weight("", [0, 2], np.int64)
            made.graph.sparse_initializer.append(helper.make_sparse_tensor(*parts, [4]))
            return made

        assert not diff(model(2.0), renamed(model(2.0))).found
        assert only(diff(model(2.0), renamed(model(2.5))), "weights").data["max_abs"] == 0.5


def copied_tensor(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


class TestExternal:
    def test_the_same_bytes_of_one_file_are_not_read(self, tmp_path: Path) -> None:
        path = builders.external(tmp_path, offset=0, length=32)
        other = onnx.load(path, load_external_data=False)
        (tmp_path / "b.onnx").write_bytes(renamed(other).SerializeToString())
        (tmp_path / "w.bin").unlink()
        assert not diff(path, tmp_path / "b.onnx").found

    def test_other_files_are_read_through_the_gate(self, tmp_path: Path) -> None:
        a, b = builders.external(tmp_path / "a"), builders.external(tmp_path / "b")
        inline = onnx.load(a)
        assert not diff(a, b).found
        assert not diff(a, inline).found
        data = np.fromfile(tmp_path / "b" / "w.bin", np.float32)
        data[5] += 0.5
        data.tofile(tmp_path / "b" / "w.bin")
        one = only(diff(a, b), "weights")
        assert (one.data["elements_differ"], one.data["max_abs"]) == (1, 0.5)

    def test_a_root_has_to_be_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        a = builders.external(tmp_path / "a")
        (tmp_path / "out").mkdir()
        (tmp_path / "a" / "w.bin").rename(tmp_path / "out" / "w.bin")
        b = builders.external(tmp_path / "b")
        with pytest.raises(ModelError, match="missing"):
            diff(a, b)
        assert run(["diff", str(a), str(b)]) == 2
        assert "missing" in capsys.readouterr().err
        assert run(["diff", str(a), str(b), "--external-root", str(tmp_path / "out")]) == 0


class TestNodes:
    def test_attribute(self) -> None:
        def change(other: onnx.ModelProto) -> None:
            conv = node(other, "Conv")
            next(a for a in conv.attribute if a.name == "pads").ints[0] = 7

        one = only(changed(onnx.load(DEMO), change), "nodes")
        assert one.kind == "changed"
        assert one.type == "Conv"
        assert one.edits == (("pads", "[1, 1, 1, 1]", "[7, 1, 1, 1]"),)

    def test_attribute_against_its_default(self) -> None:
        a = builders.parsed("g (float[2, 2] x) => (float[2, 2] y) { y = Softmax (x) }")
        b = builders.parsed("g (float[2, 2] x) => (float[2, 2] y) { y = Softmax <axis = 0> (x) }")
        assert only(diff(a, b), "nodes").edits == (("axis", "-1 (default)", "0"),)

    def test_tensor_attribute(self) -> None:
        def model(value: float) -> onnx.ModelProto:
            fill = helper.make_node("ConstantOfShape", ["s"], ["y"], value=builders.weight("", [value]))
            return builders.model([fill], [builders.value("s", (1,), TensorProto.INT64)], [builders.value("y")])

        assert only(diff(model(1), model(2)), "nodes").edits == (("value", "float32[1] [1.0]", "float32[1] [2.0]"),)

    @pytest.mark.parametrize("op_type", ["Identity", "Relu"])
    def test_inserted_and_removed(self, op_type: str) -> None:
        def insert(other: onnx.ModelProto) -> None:
            at = next(k for k, n in enumerate(other.graph.node) if n.op_type == "Conv") + 1
            made = other.graph.node[at - 1].output[0]
            for user in other.graph.node:
                user.input[:] = ["new" if name == made else name for name in user.input]
            other.graph.node.insert(at, helper.make_node(op_type, [made], ["new"], name="added"))

        model = onnx.load(DEMO)
        one = only(changed(model, insert), "nodes")
        assert (one.kind, one.type) == ("added", op_type)
        other = copied(model)
        insert(other)
        one = only(diff(other, renamed(model)), "nodes")
        assert (one.kind, one.name, one.type) == ("removed", "added", op_type)
        assert one.data["inputs"] == [node(model, "Conv").output[0]]
        assert len(one.data["used_by"]) >= 1

    def test_replaced(self) -> None:
        def change(other: onnx.ModelProto) -> None:
            node(other, "Relu").op_type = "Sigmoid"

        one = only(changed(onnx.load(DEMO), change), "nodes")
        assert one.edits == (("operator", "Relu", "Sigmoid"),)

    def test_two_operators_swapped(self) -> None:
        a = builders.parsed("g (float[2] x) => (float[2] y) { a = Abs(x)  b = Relu(a)  c = Neg(b)  y = Exp(c) }")
        b = builders.parsed("g (float[2] x) => (float[2] y) { a = Abs(x)  b = Neg(a)  c = Relu(b)  y = Exp(c) }")
        found = diff(a, renamed(b))
        assert {one.section for one in found.found} == {"nodes"}
        assert {one.name for one in found.found} == {"b", "c", "y"}
        assert all(one.edits[0][0] == "input 0" for one in found.found)

    def test_inputs_swapped(self) -> None:
        def change(other: onnx.ModelProto) -> None:
            other.graph.node[0].input[:] = list(other.graph.node[0].input)[::-1]

        model = builders.parsed("g (float[2] p, float[2] q) => (float[2] y) { y = Sub(p, q) }")
        one = only(changed(model, change), "nodes")
        assert one.edits == (("input 0", "p", "q"), ("input 1", "q", "p"))

    def test_rewired_to_another_value(self) -> None:
        model = builders.parsed(
            "g (float[2] x) => (float[2] y, float[2] z) { r = Relu(x)  n = Neg(x)  y = Exp(r)  z = Abs(n) }"
        )

        def change(other: onnx.ModelProto) -> None:
            node(other, "Exp").input[0] = "n"

        one = only(changed(model, change), "nodes")
        assert (one.type, one.edits[0][1]) == ("Exp", "r (Relu)")

    def test_output_made_of_something_else(self) -> None:
        a = builders.parsed("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)  z = Neg(x) }")
        b = builders.parsed("g (float[2] x) => (float[2] y, float[2] z) { z = Relu(x)  y = Neg(x) }")
        assert diff(a, b).differences == 2

    def test_equal_branches_with_weights_dealt_out_anew(self) -> None:
        def model(order: list[int]) -> onnx.ModelProto:
            rng = np.random.default_rng(0)
            arrays = [rng.standard_normal((4, 4)) for _ in order]
            weights = [builders.weight(f"w{i}", arrays[k]) for i, k in enumerate(order)]
            nodes = [helper.make_node("MatMul", ["x", w.name], [f"m{w.name}"]) for w in weights]
            nodes += [helper.make_node("Relu", [n.output[0]], [f"r{n.output[0]}"]) for n in nodes]
            nodes.append(
                helper.make_node("Concat", [n.output[0] for n in nodes[len(order) :]], ["y"], name="c", axis=0)
            )
            return builders.model(nodes, [builders.value("x", (4, 4))], [builders.value("y", (4, None))], weights)

        order = random.Random(0).sample(range(100), 100)
        one = only(diff(model(sorted(order)), renamed(model(order))), "nodes")
        assert one.name == "c"
        assert len(one.edits) > 90

    def test_two_draws_are_not_one(self) -> None:
        draws = "a = RandomUniformLike(x)  b = RandomUniformLike(x)"
        text = f"g (float[2] x) => (float[2] y, float[2] z) {{ {draws}  %s  z = Add(a, b) }}"
        a, b = builders.parsed(text % "y = Sub(a, b)"), builders.parsed(text % "y = Sub(a, a)")
        assert diff(a, b).differences


class TestBodiesAndFunctions:
    def test_a_node_of_a_body(self) -> None:
        def change(other: onnx.ModelProto) -> None:
            branches = [a.g for n in other.graph.node for a in n.attribute if a.name == "then_branch"]
            branches[0].node[0].op_type = "Sigmoid"

        one = only(changed(builders.conditional(3), change), "nodes")
        assert one.edits == (("operator", "Relu", "Sigmoid"),)
        assert one.scope == "if0.then_branch"

    def test_a_weight_captured_by_a_body(self) -> None:
        model = onnx.load(ROOT / "fixtures" / "models" / "control.onnx")
        mine = {t.name for t in model.graph.initializer}
        bodies = [a.g for n in model.graph.node for a in n.attribute if a.HasField("g")]
        name = next(i for g in bodies for n in g.node for i in n.input if i in mine)

        def change(other: onnx.ModelProto) -> None:
            nudge(next(t for t in other.graph.initializer if t.name == name), 0.25)

        assert only(changed(model, change), "weights").data["max_abs"] == pytest.approx(0.25)

    def test_a_body_reads_another_value(self) -> None:
        def model(captured: str) -> onnx.ModelProto:
            then = builders.branch("t", [helper.make_node("Neg", [captured], ["o"])], "o")
            other = builders.branch("e", [helper.make_node("Abs", ["p"], ["o"])], "o")
            nodes = [helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other)]
            values = [builders.value("p"), builders.value("q"), builders.value("c", (), TensorProto.BOOL)]
            return builders.model(nodes, values, [builders.value("y")])

        one = only(diff(model("p"), renamed(model("q"))), "nodes")
        assert (one.scope, one.edits) == ("if.then_branch", (("input 0", "p", "q"),))

    def test_nested_bodies(self) -> None:
        def change(other: onnx.ModelProto) -> None:
            graph = other.graph
            for _ in range(6):
                graph = next(a.g for a in graph.node[0].attribute if a.name == "then_branch")
            graph.node[0].op_type = "Relu"

        assert only(changed(builders.nested(6), change), "nodes").edits == (("operator", "Identity", "Relu"),)

    def test_function(self) -> None:
        def change(other: onnx.ModelProto) -> None:
            other.functions[0].node[1].op_type = "Mul"

        one = only(changed(builders.function_model(), change), "nodes")
        assert (one.scope, one.edits) == ("function mine::AddK", (("operator", "Add", "Mul"),))

        def other_weight(other: onnx.ModelProto) -> None:
            nudge(other.functions[0].node[0].attribute[0].t, 1.0)

        one = only(changed(builders.function_model(), other_weight), "weights")
        assert (one.scope, one.data["max_abs"]) == ("function mine::AddK", 1.0)

        def more(other: onnx.ModelProto) -> None:
            function = copied_function(other.functions[0], "Other")
            other.functions.append(function)

        assert only(changed(builders.function_model(), more), "functions").kind in ("added", "removed")


def copied_function(function: onnx.FunctionProto, name: str) -> onnx.FunctionProto:
    copy = onnx.FunctionProto()
    copy.CopyFrom(function)
    copy.name = name
    return copy


def _rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "other"


def _declare(model: onnx.ModelProto) -> None:
    model.graph.value_info.append(builders.value("h", ("batch", 32)))


def _rest_of_the_model() -> list[Any]:
    def case(section: str, text: str, change: Callable[[onnx.ModelProto], object]) -> Any:
        return pytest.param(section, text, change, id=f"{section}: {text}")

    return [
        case("interface", "x -> other", _rename_input),
        case("interface", "float32[batch, 32] -> float32[batch, 33]", lambda m: _dim(m.graph.input[0], 1, 33)),
        case(
            "interface", "float32[batch, 32] -> int8[batch, 32]", lambda m: _type(m.graph.output[0], TensorProto.INT8)
        ),
        case("interface", "input z", lambda m: m.graph.input.append(builders.value("z"))),
        case("model", "21 -> 20", lambda m: setattr(m.opset_import[0], "version", 20)),
        case("model", "opset com.x", lambda m: m.opset_import.append(helper.make_opsetid("com.x", 1))),
        case("model", "IR version", lambda m: setattr(m, "ir_version", 9)),
        case("model", "producer name", lambda m: setattr(m, "producer_name", "someone")),
        case("model", "domain", lambda m: setattr(m, "domain", "org.x")),
        case("model", "model version", lambda m: setattr(m, "model_version", 3)),
        case("model", "training information", lambda m: m.training_info.add()),
        case("texts", "metadata key", lambda m: m.metadata_props.add(key="key", value="v")),
        case("texts", "model doc string", lambda m: setattr(m, "doc_string", "words")),
        case("texts", "graph", lambda m: setattr(m.graph, "doc_string", "words")),
        case("texts", "node first", lambda m: setattr(m.graph.node[0], "doc_string", "words")),
        case("texts", "node act", lambda m: m.graph.node[1].metadata_props.add(key="k", value="v")),
        case("texts", "weight w1", lambda m: setattr(m.graph.initializer[0], "doc_string", "words")),
        case("texts", "input x", lambda m: setattr(m.graph.input[0], "doc_string", "words")),
        case("declared", "float32[batch, 32]", _declare),
    ]


def _dim(value: onnx.ValueInfoProto, at: int, size: int) -> None:
    value.type.tensor_type.shape.dim[at].dim_value = size


def _type(value: onnx.ValueInfoProto, code: int) -> None:
    value.type.tensor_type.elem_type = code


@pytest.mark.parametrize(("section", "text", "change"), _rest_of_the_model())
def test_rest_of_the_model(
    section: str, text: str, change: Change, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = builders.mlp()
    change(other)
    only(diff(builders.mlp(), other), section)
    for name, model in (("a", builders.mlp()), ("b", other)):
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    assert run(["diff", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]) == 1
    assert text in capsys.readouterr().out


def test_declared_shape_changed() -> None:
    a, b = builders.mlp(), builders.mlp()
    _declare(a)
    _declare(b)
    _dim(b.graph.value_info[0], 1, 31)
    assert only(diff(a, renamed(b)), "declared").edits == (("type", "float32[batch, 32]", "float32[batch, 31]"),)


def test_order_of_inputs() -> None:
    a = builders.parsed("g (float[2] p, float[2] q) => (float[2] y) { y = Sub(p, q) }")
    b = builders.parsed("g (float[2] q, float[2] p) => (float[2] y) { y = Sub(p, q) }")
    assert only(diff(a, b), "interface").edits == (("order", "p, q", "q, p"),)


def test_in_python_it_is_a_function_of_the_package() -> None:
    for _ in range(2):  # a module of that name would take its place after the first import
        found = graphopt.diff(builders.mlp(), builders.mlp(seed=1))
        assert isinstance(found, graphopt.Diff)
        assert found.differences == 2


class TestCommandLine:
    def files(self, folder: Path) -> list[str]:
        other = builders.mlp(seed=1)
        node(other, "Relu").op_type = "Tanh"
        onnx.save(builders.mlp(), folder / "a.onnx")
        onnx.save(other, folder / "b.onnx")
        return [str(folder / "a.onnx"), str(folder / "b.onnx")]

    def test_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        a, b = self.files(tmp_path)
        assert run(["diff", a, b, "--json"]) == 1
        shown = capsys.readouterr()
        report = json.loads(shown.out)
        assert shown.err == ""
        assert report["schema_version"] == 1
        assert report["differences"] == sum(len(report[name]) for name in SECTIONS) == 3
        assert [m["path"] for m in report["models"]] == [a, b]
        assert report["nodes"][0]["changes"] == [{"what": "operator", "before": "Relu", "after": "Tanh"}]

    def test_quiet(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["diff", *self.files(tmp_path), "-q"]) == 1
        assert capsys.readouterr() == ("", "")

    def test_many_are_cut_unless_verbose(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        onnx.save(builders.chain(3), tmp_path / "a.onnx")
        onnx.save(builders.chain(40), tmp_path / "b.onnx")
        files = [str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
        assert run(["diff", *files]) == 1
        assert "more; -v shows all" in capsys.readouterr().out
        assert run(["diff", *files, "-v"]) == 1
        assert capsys.readouterr().out.count("added") == 37

    @pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04"])
    def test_bad_input(self, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "bad.onnx").write_bytes(content)
        assert run(["diff", str(DEMO), str(tmp_path / "bad.onnx")]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ")
        assert run(["diff", str(DEMO), str(tmp_path / "none.onnx")]) == 2


UNARY = ("Relu", "Neg", "Abs", "Exp", "LeakyRelu")
BINARY = ("Add", "Sub", "Mul")


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Any graph of a dozen nodes on [2, 2], some of them dead, some weights equal."""
    values, nodes, weights = ["p", "q"], [], []
    for index in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from([*UNARY, *BINARY, "MatMul"]))
        name = f"v{index}"
        inputs = [draw(st.sampled_from(values))]
        if kind in BINARY:
            inputs.append(draw(st.sampled_from(values)))
        elif kind == "MatMul":
            weights.append(builders.weight(f"w{index}", np.full((2, 2), draw(st.integers(0, 3)))))
            inputs.append(f"w{index}")
        extra = {"alpha": draw(st.sampled_from([0.1, 0.2]))} if kind == "LeakyRelu" else {}
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **extra))
        values.append(name)
    ends = draw(st.lists(st.sampled_from(values[2:]), min_size=1, max_size=2, unique=True))
    ports = [builders.value(name, (2, 2)) for name in ("p", "q", *ends)]
    return builders.model(nodes, ports[:2], ports[2:], weights)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(0, 2**16))
def test_renaming_any_graph_is_no_difference(model: onnx.ModelProto, seed: int) -> None:
    found = diff(model, renamed(model, seed))
    assert not found.found, found.as_dict()


def terms(model: onnx.ModelProto) -> dict[str, object]:
    """What each value computes, written out."""
    found: dict[str, object] = {v.name: v.name for v in model.graph.input}
    found |= {t.name: t.raw_data for t in model.graph.initializer}
    for one in model.graph.node:
        attributes = tuple(a.f for a in one.attribute)
        found[one.output[0]] = hash((one.op_type, attributes, *(found[name] for name in one.input)))
    return found


def mutate(model: onnx.ModelProto, data: st.DataObject) -> None:
    """One change that makes it another model."""
    graph = model.graph
    at = data.draw(st.integers(0, len(graph.node) - 1), label="node")
    one, kinds = graph.node[at], ["operator", "insert", "add", "opset", "metadata", "input"]
    known = terms(model)
    earlier = [*("p", "q"), *(n.output[0] for n in list(graph.node)[:at])]
    others = [name for name in earlier if known[name] != known[one.input[0]]]
    kinds += (["weight"] if graph.initializer else []) + (["rewire"] if others else [])
    kinds += ["attribute"] if one.attribute else []
    kind = data.draw(st.sampled_from(kinds), label="kind")
    if kind == "operator":
        one.op_type = "Sigmoid" if len(one.input) == 1 else "Div" if one.op_type != "MatMul" else "Gemm"
    elif kind == "insert":
        graph.node.insert(at, helper.make_node("Identity", [one.input[0]], ["fresh"]))
        one_again = graph.node[at + 1]
        one_again.input[0] = "fresh"
    elif kind == "add":
        graph.node.append(helper.make_node(data.draw(st.sampled_from(UNARY[:4])), ["p"], ["fresh"]))
    elif kind == "weight":
        nudge(graph.initializer[0])
    elif kind == "rewire":
        one.input[0] = data.draw(st.sampled_from(others))
    elif kind == "attribute":
        one.attribute[0].f += 1
    elif kind == "opset":
        model.opset_import[0].version -= 1
    elif kind == "metadata":
        model.metadata_props.add(key="k", value="v")
    else:
        graph.input[0].name = "renamed"
        for user in graph.node:
            user.input[:] = ["renamed" if name == "p" else name for name in user.input]


@settings(max_examples=250, deadline=None)
@given(graphs(), st.data())
def test_any_single_mutation_is_a_difference(model: onnx.ModelProto, data: st.DataObject) -> None:
    other = copied(model)
    mutate(other, data)
    shuffled = renamed(other, data.draw(st.integers(0, 2**16), label="seed"))
    assert diff(model, shuffled).differences
    assert diff(shuffled, model).differences


def test_attributes_without_a_type_are_read_by_their_content() -> None:
    def model(alpha: float) -> onnx.ModelProto:
        made = builders.model(
            [helper.make_node("LeakyRelu", ["x"], ["y"])], [builders.value("x")], [builders.value("y")]
        )
        made.graph.node[0].attribute.add(name="alpha", f=alpha)  # as IR version 1 wrote it
        return made

    assert only(diff(model(0.5), model(0.25)), "nodes").edits == (("alpha", "0.5", "0.25"),)


def test_a_tensor_of_another_type_than_its_data_is_refused() -> None:
    broken = builders.relu()
    broken.graph.initializer.add(name="w", data_type=TensorProto.INT16, dims=[1], float_data=[1.0])
    with pytest.raises(ModelError, match="'w'"):
        diff(broken, builders.relu())


def test_names_that_are_no_text_are_refused() -> None:
    data = builders.relu().SerializeToString().replace(b"N", b"\xff")
    with pytest.raises(ModelError, match="no text"):
        diff(onnx.ModelProto.FromString(data), builders.relu())


def test_names_come_out_printable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = builders.mlp()
    other.graph.node[1].name = "[bold]\x1b[31mred"
    other.graph.node[1].op_type = "Tanh"
    onnx.save(other, tmp_path / "a.onnx")
    onnx.save(builders.mlp(), tmp_path / "b.onnx")
    assert run(["diff", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]" in out
