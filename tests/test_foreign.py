"""Other people's callables as passes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as real_gs
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import recipe
from graphopt.errors import InputError, ModelError
from graphopt.foreign import ForeignPass, foreign, kind_of, resolve
from graphopt.ledger import RunResult
from graphopt.manager import PassManager
from graphopt.model import fingerprint, load, to_proto

ROOT = Path(__file__).resolve().parent.parent

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


@pytest.fixture(autouse=True)
def _reproducers_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def model() -> ir.Model:
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["x"], ["i"], name="copy"),
            helper.make_node("Mul", ["i", "w"], ["m"], name="mul"),
            helper.make_node("Relu", ["m"], ["y"], name="relu"),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.asarray([1, -2, 3], np.float32), "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made.metadata_props.add(key="who", value="me")
    return load(made)


def outputs(of: ir.Model) -> Any:
    session = onnxruntime.InferenceSession(to_proto(of).SerializeToString())
    return session.run(None, {"x": np.asarray([[1, 2, 3], [-1, -2, -3]], np.float32)})[0]


def ops(of: ir.Model) -> list[str]:
    return [n.op_type for n in of.graph]


# --- good and wrong ones of each kind, as their authors would write them ---


def drop_identity(proto: onnx.ModelProto) -> onnx.ModelProto:
    kept = [n for n in proto.graph.node if n.op_type != "Identity"]
    for node in kept:
        for index, name in enumerate(node.input):
            if name == "i":
                node.input[index] = "x"
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return proto


def drop_identity_and_say_so(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    return drop_identity(proto), True


def wrong_proto(proto: onnx.ModelProto) -> onnx.ModelProto:
    next(n for n in proto.graph.node if n.op_type == "Relu").op_type = "Neg"
    return proto


def broken_proto(proto: onnx.ModelProto) -> onnx.ModelProto:
    proto.graph.node[1].input[0] = "nowhere"
    return proto


def no_proto(proto: onnx.ModelProto) -> None:
    return None


def nothing(proto: onnx.ModelProto) -> onnx.ModelProto:
    return proto


def drop_identity_gs(graph: gs.Graph) -> None:
    identity = next(n for n in graph.nodes if n.op == "Identity")
    mul = next(n for n in graph.nodes if n.op == "Mul")
    mul.inputs[0] = identity.inputs[0]
    graph.cleanup()


def wrong_gs(graph: real_gs.Graph) -> real_gs.Graph:
    next(n for n in graph.nodes if n.op == "Relu").op = "Neg"
    return graph


def no_annotation(graph):  # type: ignore[no-untyped-def]
    return drop_identity(graph)


class DropIdentity(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in [n for n in model.graph if n.op_type == "Identity"]:
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
            model.graph.remove([node], safe=True)
        return ir.passes.PassResult(model, True)


class DropIdentityInACopy(ir.passes.FunctionalPass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return DropIdentity()(model.clone())


class WrongIr(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        next(n for n in model.graph if n.op_type == "Relu").op_type = "Neg"
        return ir.passes.PassResult(model, True)


class PickyIr(DropIdentity):
    def requires(self, model: ir.Model) -> None:
        raise ir.passes.PreconditionError("there is no Conv")


instance = DropIdentity()
not_callable = 3

GOOD = [
    ("drop_identity", drop_identity, "proto"),
    ("drop_identity_and_say_so", drop_identity_and_say_so, "proto"),
    ("no_annotation", no_annotation, "proto"),
    ("drop_identity_gs", drop_identity_gs, "gs"),
    ("DropIdentity", DropIdentity, "ir"),
    ("instance", instance, "ir"),
    ("DropIdentityInACopy", DropIdentityInACopy, "ir"),
]
WRONG = [("wrong_proto", wrong_proto), ("wrong_gs", wrong_gs), ("WrongIr", WrongIr)]


def apply(*passes: Any, **options: Any) -> tuple[ir.Model, RunResult]:
    given = model()
    before = fingerprint(given)
    result = PassManager(passes, **options).run(given)
    assert fingerprint(given) == before
    return given, result


def check_good(given: ir.Model, result: RunResult) -> None:
    entry = result.ledger[0]
    assert entry.status == "changed", entry.reason
    assert entry.contract == "exact"
    assert entry.changes[0].detail == "1 nodes gone, 0 new"
    assert ops(result.model) == ["Mul", "Relu"]
    assert np.array_equal(outputs(given), outputs(result.model))
    assert dict(result.model.metadata_props) == {"who": "me"}


@pytest.mark.parametrize(("name", "function", "view"), GOOD)
def test_from_python(name: str, function: Any, view: str) -> None:
    assert kind_of(function) == view
    check_good(*apply(foreign(function)))


@pytest.mark.parametrize(("name", "function", "view"), GOOD)
def test_from_a_recipe(name: str, function: Any, view: str) -> None:
    given = recipe.parse(f'[[pass]]\nuse = "{__name__}:{name}"\n')
    step = given.passes[0]
    assert isinstance(step, ForeignPass)
    assert (step.view, step.contract, step.use) == (view, "exact", f"{__name__}:{name}")
    check_good(*apply(*given.passes))
    assert recipe.parse(recipe.write(given)) == given


@pytest.mark.parametrize(("name", "function"), WRONG)
@pytest.mark.parametrize("verify", ["end", "each"])
def test_a_wrong_one_is_reverted(name: str, function: Any, verify: str) -> None:
    given, result = apply(foreign(drop_identity), foreign(function), verify=verify)
    assert [e.status for e in result.ledger] == ["changed", "reverted"]
    assert result.ledger[1].name == f"{__name__}:{name}"
    assert ops(result.model) == ["Mul", "Relu"]
    assert np.array_equal(outputs(given), outputs(result.model))
    assert result.reproducer is not None
    again = recipe.read(result.reproducer / "recipe.toml")
    repeated = PassManager(again.passes, verify="off").run(load(result.reproducer / "before.onnx"))
    assert ops(repeated.model) == ["Mul", "Neg"]


def test_the_recipe_says_the_contract() -> None:
    given = recipe.parse(f'[[pass]]\nuse = "{__name__}:wrong_proto"\ncontract = "approximate"\n')
    _, result = apply(*given.passes)
    assert [(e.status, e.contract) for e in result.ledger] == [("changed", "approximate")]
    assert ops(result.model)[-1] == "Neg"


def test_what_is_broken_or_no_model_is_reverted() -> None:
    for function, reason in ((broken_proto, "nowhere"), (no_proto, "returned a NoneType, not an onnx.ModelProto")):
        given, result = apply(foreign(function), foreign(drop_identity))
        assert [e.status for e in result.ledger] == ["reverted", "changed"]
        assert reason in str(result.ledger[0].reason)
        assert ops(result.model) == ["Mul", "Relu"]
        assert np.array_equal(outputs(given), outputs(result.model))
    _, result = apply(foreign(broken_proto, contract="approximate"))
    assert result.ledger[0].status == "reverted"


def test_nothing_done_is_said() -> None:
    _, result = apply(foreign(nothing))
    assert result.ledger[0].status == "unchanged"
    assert result.ledger[0].skipped[0].reason == "it changed nothing"


def test_their_precondition_is_a_skip() -> None:
    _, result = apply(foreign(PickyIr))
    assert result.ledger[0].status == "skipped"
    assert "there is no Conv" in str(result.ledger[0].reason)


def test_what_graphsurgeon_cannot_carry_is_a_skip() -> None:
    given = model()
    value = given.graph.initializers["w"]
    value.const_value = ir.tensor(np.asarray([1, 2, 3], np.float32), name="w")
    sparse = to_proto(given)
    sparse.graph.sparse_initializer.add(
        values=numpy_helper.from_array(np.ones(1, np.float32), "sparse"),
        indices=numpy_helper.from_array(np.zeros(1, np.int64), "indices"),
        dims=[3],
    )
    try:
        loaded = load(sparse)
    except ModelError:  # pragma: no cover  # a reader may be stricter
        pytest.skip("not loaded at all")
    result = PassManager([foreign(drop_identity_gs)]).run(loaded)
    assert result.ledger[0].status == "skipped"
    assert "graphsurgeon cannot carry this model" in str(result.ledger[0].reason)


def test_options_in_the_ledger_are_plain() -> None:
    import json

    _, result = apply(foreign(drop_identity))
    assert json.loads(json.dumps(result.ledger[0].as_dict()))["options"] == {"view": "proto", "contract": "exact"}
    assert str(foreign(drop_identity)) == f"{__name__}:drop_identity"


# --- from a file ---

FILE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx

from neighbour import KIND
from graphopt.base import Change, Pass, PassResult


@dataclass
class Settings:
    to: str = KIND


def edit(proto: onnx.ModelProto) -> onnx.ModelProto:
    proto.graph.node[2].op_type = Settings().to
    return proto


@dataclass(frozen=True)
class Edit(Pass):
    to: str = "Neg"
    name: ClassVar[str] = "edit"
    contract: ClassVar[str] = "exact"

    def run(self, model, context):
        list(model.graph)[2].op_type = self.to
        return PassResult([Change("edit", "relu")])
"""


@pytest.fixture(params=["plain", "with spaces", "漢字 配置"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / str(request.param)
    made.mkdir()
    (made / "surgery.py").write_text(FILE)
    (made / "neighbour.py").write_text('KIND = "Neg"\n')
    return made


@pytest.mark.parametrize("name", ["edit", "Edit"])
def test_from_a_file_beside_the_recipe(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "r.toml").write_text(f'[[pass]]\nuse = "surgery.py:{name}"\n', encoding="utf-8")
    given = recipe.read(folder / "r.toml")
    assert recipe.read(folder / "r.toml").passes[0].__class__.__name__ == type(given.passes[0]).__name__
    _, result = apply(*given.passes)
    assert result.ledger[0].status == "reverted"
    assert "max abs diff" in str(result.ledger[0].reason)
    assert result.reproducer is not None
    monkeypatch.chdir(folder.parent)
    again = recipe.read(result.reproducer / "recipe.toml")
    repeated = PassManager(again.passes, verify="off").run(load(result.reproducer / "before.onnx"))
    assert ops(repeated.model) == ["Identity", "Mul", "Neg"]


def test_a_function_in_a_file_survives_the_round_trip(folder: Path) -> None:
    given = recipe.parse('[[pass]]\nuse = "surgery.py:edit"\n', folder)
    assert recipe.parse(recipe.write(given)) == given
    assert recipe.parse(recipe.write(given), folder) == given


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("missing.py:edit", "^no such file: .*missing.py .for 'missing.py:edit'.; check the path$"),
        ("surgery.py:edti", "has no function 'edti'"),
        ("surgery.py:", "has no function ''"),
        ("bad.py:edit", "bad.py does not import: SyntaxError: "),
        ("raising.py:edit", "raising.py does not import: ZeroDivisionError: division by zero; fix the file"),
        ("exiting.py:edit", "exiting.py does not import: SystemExit: 3"),
        ("no_such_package.mod:f", "cannot import pass 'no_such_package.mod:f': ModuleNotFoundError"),
        ("numpy:no_such", "cannot import pass 'numpy:no_such': AttributeError"),
        (f"{__name__}:not_callable", "is a int, not callable"),
        (":", "cannot import pass ':'"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path: Path, use: str, message: str) -> None:
    (tmp_path / "surgery.py").write_text("def edit(m): return m\n")
    (tmp_path / "bad.py").write_text("def edit(m) return m\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    (tmp_path / "exiting.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(InputError, match=message) as caught:
        recipe.parse(f'[[pass]]\nuse = "{use}"\n', tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_view_or_contract() -> None:
    for text, message in (
        ('view = "numpy"', "view is 'numpy'; one of proto, gs, ir"),
        ('contract = "exakt"', "contract is 'exakt'; one of exact, approximate"),
        ("contract = 3", "'contract' in pass .* is 3; it must be a string"),
        ('veiw = "gs"', "unknown key 'veiw' .* did you mean 'view'"),
    ):
        with pytest.raises(InputError, match=message):
            recipe.parse(f'[[pass]]\nuse = "{__name__}:drop_identity"\n{text}\n')


def test_a_local_function_works_from_python() -> None:
    def local(proto: onnx.ModelProto) -> onnx.ModelProto:
        return wrong_proto(proto)

    _, result = apply(foreign(local))
    assert result.ledger[0].status == "reverted"
    assert result.reproducer is not None
    assert (result.reproducer / "before.onnx").is_file()
    _, result = apply(foreign(lambda proto: drop_identity(proto)))
    assert result.ledger[0].status == "changed"


def test_resolve_finds_nested_names() -> None:
    assert resolve("onnx_ir:passes.PassBase") is ir.passes.PassBase


def nothing_gs(graph: gs.Graph) -> None:
    del graph


@pytest.mark.parametrize("function", [nothing, nothing_gs])
@pytest.mark.parametrize("path", sorted((ROOT / "fixtures" / "models").glob("*.onnx")), ids=lambda p: p.stem)
def test_a_no_op_is_no_change_on_any_model(path: Path, function: Any) -> None:
    given = load(path)
    result = PassManager([foreign(function)], verify="off").run(given)
    entry = result.ledger[0]
    if entry.changes:  # graphsurgeon may write an attribute in another way
        assert function is nothing_gs
        assert entry.changes[0].detail == "0 nodes gone, 0 new"
    else:
        assert entry.status in ("unchanged", "skipped")
        assert to_proto(result.model) == to_proto(given)


def test_neighbours_of_the_same_name_in_two_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper.py").write_text(f'NAME = "{name}"\n')
        (tmp_path / name / "mine.py").write_text("import helper\n\n\ndef name(): return helper.NAME\n")
    assert [resolve(f"{tmp_path / name / 'mine.py'}:name")() for name in ("one", "two")] == ["one", "two"]
