"""--dim, --input-shape, --fold-overridable, --opset: the interface changes as asked, what is left is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import MODELS, Ran, run_cli
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.base import Change, Context, Contract, Pass, PassResult
from graphopt.errors import InputError, NothingDone, PreconditionError
from graphopt.manager import PassManager
from graphopt.model import load
from graphopt.passes.freeze_shapes import FreezeShapes
from graphopt.session import Session

OPTIONS: dict[str, Any] = {"time": 0, "threads": 1}
info = helper.make_tensor_value_info


def flat(*, batch: int | str = "batch", rows: int | str = "rows", ir_version: int = 8) -> onnx.ModelProto:
    """x [batch, rows, 4] -> y [batch, rows * 4], its size computed from Shape; w may be overridden."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"], name="scale"),
        helper.make_node("Shape", ["m"], ["s"], name="shape"),
        helper.make_node("Slice", ["s", "zero", "one"], ["b"], name="first"),
        helper.make_node("Concat", ["b", "rest"], ["t"], axis=0, name="target"),
        helper.make_node("Reshape", ["m", "t"], ["y"], name="flatten"),
    ]
    stored = {"w": np.full(4, 2, np.float32), "zero": np.array([0]), "one": np.array([1]), "rest": np.array([-1])}
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", 1, [batch, rows, 4]), info("w", 1, [4])],
        [info("y", 1, [batch, "flat"])],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
        value_info=[info("m", 1, [batch, rows, 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=ir_version)


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def shapes(proto: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {v.name: shape(v) for v in (*proto.graph.input, *proto.graph.output)}


def freeze(proto: onnx.ModelProto, *, dims: Any = (), inputs: Any = ()) -> onnx.ModelProto:
    return graphopt.optimize(proto, passes=[FreezeShapes(dims=tuple(dims), inputs=tuple(inputs))], **OPTIONS).model


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"dims": ["batch=3"]}, [3, "rows", 4]),
        ({"dims": ["batch=3", "rows=5"]}, [3, 5, 4]),
        ({"inputs": ["x:3,5,4"]}, [3, 5, 4]),
        ({"inputs": ["x:[3, 5, 4]"]}, [3, 5, 4]),
        ({"inputs": ["3x5x4"]}, [3, 5, 4]),
        ({"inputs": ["x:3,?,4"]}, [3, "rows", 4]),
        ({"inputs": ["x:-1,5,-1"]}, ["batch", 5, 4]),
        ({"dims": ["batch=3"], "inputs": ["x:3,5,4"]}, [3, 5, 4]),
    ],
)
def test_what_was_asked_for_and_no_more_is_frozen(asked: dict[str, Any], expected: list[int | str]) -> None:
    proto = flat()
    before = proto.SerializeToString()
    made = freeze(proto, **asked)
    assert proto.SerializeToString() == before
    assert shapes(made)["x"] == expected
    assert shape(made.graph.value_info[0]) == expected
    whole = expected[1] == 5
    assert shapes(made)["y"] == [expected[0], 20 if whole else "flat"]
    x = np.arange(60, dtype=np.float32).reshape(3, 5, 4)
    np.testing.assert_array_equal(Session(made).run({"x": x})["y"], Session(proto).run({"x": x})["y"])


def test_names_that_tie_inputs_together_and_names_with_colons() -> None:
    nodes = [helper.make_node("Concat", ["in:0", "b"], ["y"], axis=1)]
    graph = helper.make_graph(
        nodes, "g", [info("in:0", 1, ["n", 2]), info("b", 1, ["n", "k"])], [info("y", 1, ["n", None])]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = freeze(proto, inputs=["in:0:6,2"])
    assert shapes(made)["b"] == [6, "k"]
    assert shapes(made)["y"][0] == 6
    with pytest.raises(PreconditionError, match="'b:5,1' gives dim 'n' another size than 6"):
        freeze(proto, inputs=["in:0:6,2", "b:5,1"])
    with pytest.raises(PreconditionError, match="names no input"):
        freeze(proto, inputs=["6,2"])


def test_a_declared_shape_that_lies_gives_way_to_what_is_inferred() -> None:
    proto = flat()
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "batch"  # in truth rows * 4
    made = freeze(proto, dims=["batch=3", "rows=5"])
    assert shapes(made)["y"] == [3, 20]


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown dim": (["--dim", "bacth=1"], "did you mean 'batch'?"),
    "no such dim": (["--dim", "zzz=1"], "it has 'batch', 'rows'"),
    "no number": (["--dim", "batch=one"], "write batch=1"),
    "no sign": (["--dim", "batch"], "write batch=1"),
    "zero": (["--dim", "batch=0"], "write batch=1"),
    "unknown input": (["--input-shape", "xx:1,2,4"], "did you mean 'x'?"),
    "an initializer": (["--input-shape", "w:4"], "no input 'w'"),
    "no shape": (["--input-shape", "x:a,b,c"], "write x:1,3,224,224"),
    "empty": (["--input-shape", "x:"], "write x:1,3,224,224"),
    "rank": (["--input-shape", "x:1,4"], "has 2 dims, input 'x' has 3: [batch, rows, 4]"),
    "fixed": (["--input-shape", "x:1,2,5"], "has 5 at axis 2, where input 'x' has 4"),
    "contradiction": (["--dim", "batch=1", "--input-shape", "x:2,2,4"], "gives dim 'batch' another size than 1"),
    "twice": (["--dim", "batch=1", "--dim", "batch=2"], "gives dim 'batch' another size than 1"),
    "lower opset": (["--opset", "12"], "the model is at opset 13, and it can only be raised"),
    "unknown opset": (["--opset", "999"], "opset 999 is not known"),
    "opset zero": (["--opset", "0"], "--opset"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_met_is_one_line(name: str, tmp_path: Path) -> None:
    onnx.save(flat(), tmp_path / "m.onnx")
    asked, expected = REFUSED[name]
    ran = run_cli("optimize", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", *asked)
    assert ran.code == 2
    assert expected in ran.error
    assert ran.out == ""
    assert not (tmp_path / "o.onnx").exists()


def test_a_size_the_model_does_not_run_at(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "t"], ["y"])]
    stored = [numpy_helper.from_array(np.array([2, -1, 3]), "t")]
    graph = helper.make_graph(nodes, "g", [info("x", 1, ["n", 3])], [info("y", 1, None)], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    ran = run_cli("optimize", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--dim", "n=5")
    assert ran.code == 2
    assert "does not run with the inputs asked for" in ran.error
    ran = run_cli("optimize", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--dim", "n=4", "--time", "0")
    assert ran.code == 0


def optimized(path: Path, output: Path, *arguments: str) -> Ran:
    ran = run_cli("optimize", path, "-o", output, "--time", "0", "--threads", "1", "--strict", *arguments, "--json")
    assert ran.code == 0, ran.err
    return ran


def test_a_frozen_model_loses_its_shape_nodes_and_the_report_says_what_was_frozen(tmp_path: Path) -> None:
    onnx.save(flat(), tmp_path / "m.onnx")
    ran = optimized(tmp_path / "m.onnx", tmp_path / "o.onnx", "--dim", "batch=3", "--dim", "rows=5")
    assert any("freeze-shapes, as asked: x [batch, rows, 4] -> [3, 5, 4]" in note for note in ran.json["notes"])
    assert any("exact passes compared with the original" in note for note in ran.json["notes"])
    assert ran.json["comparison"]["outputs"][0]["identical"]
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["Mul", "Reshape"]
    assert ran.json["options"]["dims"] == ["batch=3", "rows=5"]


def test_without_a_request_the_interface_stays(tmp_path: Path) -> None:
    onnx.save(flat(), tmp_path / "m.onnx")
    optimized(tmp_path / "m.onnx", tmp_path / "o.onnx")
    made = onnx.load(tmp_path / "o.onnx")
    assert list(made.graph.input) == list(flat().graph.input)
    assert list(made.graph.output) == list(flat().graph.output)


def test_data_has_to_fit_what_is_asked_for(tmp_path: Path) -> None:
    onnx.save(flat(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32))
    arguments = ("--data", str(tmp_path / "d.npz"), "--dim", "batch=1")
    ran = optimized(tmp_path / "m.onnx", tmp_path / "o.onnx", *arguments, "--dim", "rows=5")
    assert ran.json["comparison"]["samples"] >= 1
    assert any("real samples" in note for note in ran.json["notes"])
    other = ("optimize", tmp_path / "m.onnx", "-o", tmp_path / "p.onnx", *arguments, "--dim", "rows=6")
    assert run_cli(*other).code == 2
    assert not (tmp_path / "p.onnx").exists()


def test_overridable_initializers_go_on_request_only(tmp_path: Path) -> None:
    onnx.save(flat(), tmp_path / "m.onnx")
    ran = optimized(tmp_path / "m.onnx", tmp_path / "o.onnx", "--fold-overridable")
    assert [v.name for v in onnx.load(tmp_path / "o.onnx").graph.input] == ["x"]
    assert any("fold-overridable, as asked: w an input no more" in note for note in ran.json["notes"])
    assert ran.json["comparison"]["outputs"][0]["identical"]


def test_before_ir_4_they_stay_and_the_reason_is_told_without_asking(tmp_path: Path) -> None:
    ran = optimized(MODELS / "overridable.onnx", tmp_path / "o.onnx", "--fold-overridable")
    assert any("IR version 3" in note and "--opset 9" in note for note in ran.json["notes"])
    ran = optimized(MODELS / "overridable.onnx", tmp_path / "o.onnx", "--fold-overridable", "--opset", "13")
    made = onnx.load(tmp_path / "o.onnx")
    assert [v.name for v in made.graph.input] == ["image"]
    assert "BatchNormalization" not in [n.op_type for n in made.graph.node]


def test_opset_on_request(tmp_path: Path) -> None:
    onnx.save(flat(), tmp_path / "m.onnx")
    optimized(tmp_path / "m.onnx", tmp_path / "o.onnx", "--opset", "17")
    assert onnx.load(tmp_path / "o.onnx").opset_import[0].version == 17
    optimized(tmp_path / "m.onnx", tmp_path / "o.onnx", "--opset", "13")
    assert onnx.load(tmp_path / "o.onnx").opset_import[0].version == 13


def test_an_opset_that_had_to_be_reverted_is_work_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = onnx.version_converter.convert_version

    def wrong(proto: onnx.ModelProto, to: int) -> onnx.ModelProto:
        made = convert(proto, to)
        next(n for n in made.graph.node if n.op_type == "Mul").op_type = "Add"
        return made

    monkeypatch.setattr(onnx.version_converter, "convert_version", wrong)
    with pytest.raises(NothingDone, match="upgrade-opset changed nothing: reverted"):
        graphopt.optimize(flat(), opset=17, **OPTIONS)


def test_quantized_with_a_size_given() -> None:
    model = MODELS / "shared.onnx"
    made = graphopt.quantize(model, data=MODELS.parent / "data" / "shared.npz", dims=["batch=1"], **OPTIONS)
    assert shapes(made.model) == {"image": [1, 8, 8, 8], "features": [1, 8]}
    assert "QuantizeLinear" in [n.op_type for n in made.model.graph.node]


class Narrow(Pass):
    """A pass that takes an input away and changes the numbers on the way."""

    name: ClassVar[str] = "narrow"
    contract: ClassVar[Contract] = "exact"
    narrows: ClassVar[bool] = True

    def options(self) -> dict[str, Any]:
        return {}

    def run(self, model: ir.Model, context: Context) -> PassResult:
        next(n for n in model.graph if n.op_type == "Mul").op_type = "Add"
        model.graph.inputs.remove(next(v for v in model.graph.inputs if v.name == "w"))
        return PassResult([Change("narrow", "(graph)")])


def test_a_request_is_held_to_the_numbers_too() -> None:
    model = load(flat())
    result = PassManager([Narrow()]).run(model, Context(original=model, threads=1))
    assert result.ledger[0].status == "reverted"
    assert [v.name for v in result.model.graph.inputs] == ["x", "w"]
    with pytest.raises(NothingDone, match="narrow changed nothing: reverted"):
        graphopt.optimize(flat(), passes=[Narrow()], **OPTIONS)


def test_the_recipe_form(tmp_path: Path) -> None:
    onnx.save(flat(), tmp_path / "m.onnx")
    text = 'model = "m.onnx"\noutput = "o.onnx"\n[[pass]]\nuse = "freeze-shapes"\ndims = ["batch=2"]\n'
    (tmp_path / "r.toml").write_text(text)
    ran = run_cli("run", tmp_path / "r.toml")
    assert ran.code == 0, ran.err
    assert shapes(onnx.load(tmp_path / "o.onnx"))["x"] == [2, "rows", 4]


def test_a_text_where_a_list_belongs() -> None:
    with pytest.raises(InputError, match="give a list"):
        graphopt.optimize(flat(), dims="batch=1")


def test_bodies_get_the_sizes_too() -> None:
    then = helper.make_graph([helper.make_node("Neg", ["x"], ["a"])], "t", [], [info("a", TensorProto.FLOAT, ["n", 2])])
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["b"])], "e", [], [info("b", 1, ["n", 2])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    inputs = [info("x", 1, ["n", 2]), info("c", TensorProto.BOOL, [])]
    graph = helper.make_graph([node], "g", inputs, [info("y", 1, ["n", 2])])
    made = freeze(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), dims=["n=3"])
    assert [shape(a.g.output[0]) for a in made.graph.node[0].attribute] == [[3, 2], [3, 2]]
    assert shapes(made)["y"] == [3, 2]
