"""What "exact" is held to: every kind of output, of model and of feed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.base import Change, Context, Contract, Pass, PassResult
from graphopt.data import load_data
from graphopt.ledger import RunResult
from graphopt.manager import PassManager
from graphopt.model import clone, interface, load
from graphopt.registry import create
from graphopt.verify import Verifier, outline

ROOT = Path(__file__).resolve().parent.parent
FLOAT, HALF, INT64, BOOL, STRING = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING
)  # fmt: skip


@pytest.fixture(autouse=True)
def _reproducers_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    tensors: dict[str, Any] | None = None,
    *,
    ir_version: int = 8,
    opset: int = 17,
) -> ir.Model:
    made = [numpy_helper.from_array(np.asarray(v), k) for k, v in (tensors or {}).items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, made)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    return load(proto)


def tensor(name: str, kind: int = FLOAT, shape: Any = ("n", 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


@dataclass(frozen=True)
class Scale(Pass):
    """Replaces an initializer by a multiple of itself."""

    which: str = "w"
    by: float = 1.0
    add: float = 0.0
    name: ClassVar[str] = "scale"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        value = model.graph.initializers[self.which]
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.dtype.kind == "f":
            value.const_value = ir.tensor((array * self.by + self.add).astype(array.dtype), name=self.which)
        elif array.dtype.kind == "i":
            value.const_value = ir.tensor(array + np.int64(self.add), name=self.which)
        else:
            texts = [text + b"?" * int(self.add) for text in array]
            value.const_value = ir.StringTensor(texts, shape=ir.Shape(array.shape), name=self.which)
        return PassResult([Change("scale", self.which)])


def apply(model: ir.Model, *passes: Pass, **context: Any) -> RunResult:
    return PassManager(passes).run(model, Context(original=model, **context))


def statuses(model: ir.Model, *passes: Pass, **context: Any) -> list[str]:
    return [e.status for e in apply(model, *passes, **context).ledger]


def test_half_precision() -> None:
    model = model_of(
        [node("MatMul", "x w", "y")],
        [tensor("x", HALF)],
        [tensor("y", HALF, ("n", 3))],
        {"w": np.linspace(-1, 1, 12).reshape(4, 3).astype(np.float16)},
    )
    assert statuses(model, Scale(by=1.0005)) == ["changed"]  # below one unit in the last place of float16
    assert statuses(model, Scale(by=1.05)) == ["reverted"]


def test_integers_and_booleans_are_equal_or_wrong() -> None:
    model = model_of(
        [node("Add", "x w", "y"), node("Greater", "y zero", "b")],
        [tensor("x", INT64)],
        [tensor("y", INT64), tensor("b", BOOL)],
        {"w": np.asarray([2**60], np.int64), "zero": np.asarray([2**60 + 5], np.int64)},
    )
    assert statuses(model, Scale(add=0)) == ["changed"]
    # One in 2^60 is less than a float64 can tell.
    result = apply(model, Scale(add=1))
    assert result.ledger[0].status == "reverted"
    assert "max abs diff 1," in str(result.ledger[0].reason)
    result = apply(model, Scale("zero", add=1))
    assert result.ledger[0].status == "reverted"
    assert "'b'" in str(result.ledger[0].reason)


def test_strings() -> None:
    model = model_of(
        [node("Gather", "w x", "y")],
        [tensor("x", INT64, ("n",))],
        [tensor("y", STRING, ("n",))],
        {"w": np.asarray(["cat", "dog", "cow"], object)},
    )
    assert statuses(model, Scale(add=0)) == ["changed"]
    assert statuses(model, Scale(add=1)) == ["reverted"]


def test_string_inputs_are_in_the_reproducer() -> None:
    model = model_of(
        [node("Identity", "x", "z"), node("Mul", "a w", "y")],
        [tensor("x", STRING, ("n",)), tensor("a")],
        [tensor("z", STRING, ("n",)), tensor("y")],
        {"w": np.asarray([2.0], np.float32)},
    )
    result = apply(model, Scale(by=3.0))
    assert result.reproducer is not None
    with np.load(result.reproducer / "feed_0.npz") as data:
        assert data["x"].dtype.kind == "U"


def test_sequences_and_maps() -> None:
    graph = helper.make_graph(
        [
            node("MatMul", "x w", "scores"),
            node("SequenceConstruct", "scores scores", "y"),
            helper.make_node("ZipMap", ["scores"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[7, 8, 9]),
        ],
        "maps",
        [tensor("x")],
        [
            helper.make_tensor_sequence_value_info("y", FLOAT, None),
            helper.make_value_info(
                "m",
                helper.make_sequence_type_proto(
                    helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))
                ),
            ),
        ],
        [numpy_helper.from_array(np.eye(4, 3, dtype=np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = load(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    assert statuses(model, Scale(by=1 + 1e-7)) == ["changed"]
    result = apply(model, Scale(by=1.001))
    assert result.ledger[0].status == "reverted"
    assert "max abs diff" in str(result.ledger[0].reason)


def test_nan_outputs_compare_by_place() -> None:
    model = model_of(
        [node("Mul", "x w", "m"), node("Sqrt", "m", "y")], [tensor("x")], [tensor("y")], {"w": np.ones(4, np.float32)}
    )
    assert statuses(model, Scale(by=1 + 1e-7)) == ["changed"]  # NaN wherever x is negative, before and after
    result = apply(model, Scale(by=-1.0))
    assert "NaN or Inf in other places" in str(result.ledger[0].reason)
    all_nan = model_of([node("Mul", "x w", "y")], [tensor("x")], [tensor("y")], {"w": np.full(4, np.nan, np.float32)})
    assert statuses(all_nan, Scale(by=2.0)) == ["changed"]
    assert statuses(all_nan, Scale(by=0.0)) == ["changed"]  # NaN * 0 is NaN

    @dataclass(frozen=True)
    class Ones(Pass):
        name: ClassVar[str] = "ones"
        contract: ClassVar[Contract] = "exact"

        def run(self, model: ir.Model, context: Context) -> PassResult:
            model.graph.initializers["w"].const_value = ir.tensor(np.ones(4, np.float32), name="w")
            return PassResult([Change("scale", "w")])

    assert statuses(all_nan, Ones()) == ["reverted"]


def random_model(*, also: bool) -> ir.Model:
    nodes = [node("RandomNormalLike", "x", "r"), node("Add", "x r", "noisy")]
    outputs = [tensor("noisy")]
    if also:
        nodes.append(node("Mul", "x w", "y"))
        outputs.append(tensor("y"))
    else:
        nodes.append(node("Mul", "noisy w", "y"))
        outputs = [tensor("y")]
    return model_of(nodes, [tensor("x")], outputs, {"w": np.ones(4, np.float32)})


def test_non_deterministic_outputs_are_left_out_and_that_is_said() -> None:
    model = random_model(also=True)
    result = apply(model, Scale(by=1 + 1e-7))
    assert result.ledger[0].status == "changed"
    assert "output 'noisy' is non-deterministic in the original: excluded" in result.notes
    result = apply(model, Scale(by=1.1))
    assert result.ledger[0].status == "reverted"
    assert "'y'" in str(result.ledger[0].reason)


def test_where_nothing_is_deterministic_only_that_it_runs_is_checked() -> None:
    model = random_model(also=False)
    result = apply(model, Scale(by=2.0))
    assert result.ledger[0].status == "changed"
    assert "output 'y' is non-deterministic in the original: excluded" in result.notes


def test_an_output_that_ties_decide_is_not_held_against_a_pass() -> None:
    """x / 3 * 3 - x is noise: its arg max depends on the last bit of the input."""
    model = model_of(
        [
            node("Div", "x three", "d"),
            node("Mul", "d three", "m"),
            node("Sub", "m x", "s"),
            node("ArgMax", "s", "y", axis=1, keepdims=0),
            node("Mul", "x w", "z"),
        ],
        [tensor("x", FLOAT, ("n", 64))],
        [tensor("y", INT64, ("n",)), tensor("z", FLOAT, ("n", 64))],
        {"three": np.asarray([3.0], np.float32), "w": np.asarray([1.0], np.float32)},
    )
    result = apply(model, Scale("w", by=1.0))
    assert result.ledger[0].status == "changed"
    assert any(n.startswith("output 'y' of the original changes with the runtime's optim") for n in result.notes)
    assert statuses(model, Scale("w", by=1.1)) == ["reverted"]


def test_inputs_on_which_the_original_is_undecided_are_left_out() -> None:
    """The logarithm of x - 1 is Inf or not by the last bit of a sample that holds a one."""
    model = model_of(
        [node("Sub", "x one", "s"), node("Log", "s", "l"), node("Mul", "l w", "y")],
        [tensor("x", FLOAT, (1, 2))],
        [tensor("y", FLOAT, (1, 2))],
        {"one": np.asarray([1.0], np.float32), "w": np.asarray([1.0], np.float32)},
    )
    samples = {"x": np.asarray([[1, 3], [2, 3]], np.float32)}
    data = load_data(samples, interface(model)[0])
    result = apply(model, Scale("w", by=1.1), data=data)
    assert result.ledger[0].status == "reverted"
    assert "1 of 3 inputs left out: NaN, Inf or shapes change there by themselves" in result.notes
    only = load_data({"x": samples["x"][:1]}, interface(model)[0])
    verifier = Verifier(model, Context(original=model, data=only))
    assert verifier.unable is None


def test_models_the_runtime_cannot_load_are_said_to_be_uncompared() -> None:
    model = load(ROOT / "fixtures" / "models" / "custom.onnx")
    name = next(n for n, v in model.graph.initializers.items() if v.const_value is not None)
    for mode in ("end", "each"):
        result = PassManager([Scale(name, by=2.0), Scale(name, by=0.5)], verify=mode).run(model)
        assert [e.status for e in result.ledger] == ["changed", "changed"]
        assert len(result.notes) == 1
        assert result.notes[0].startswith("not compared numerically: ONNX Runtime cannot load the model")
        assert "MysteryOp" in result.notes[0]


def test_inputs_that_cannot_be_drawn_are_no_crash() -> None:
    model = model_of(
        [node("ConcatFromSequence", "x", "c", axis=0), node("Mul", "c w", "y")],
        [helper.make_tensor_sequence_value_info("x", FLOAT, None)],
        [tensor("y")],
        {"w": np.ones(4, np.float32)},
    )
    result = apply(model, Scale(by=1.0))
    assert result.ledger[0].status == "changed"
    assert result.notes == [
        "not compared numerically: input 'x' is no tensor, so no random data can be made; give real data"
    ]


def overridable() -> ir.Model:
    return model_of(
        [node("MatMul", "x w", "h"), node("Add", "h b", "y")],
        [tensor("x"), tensor("w", FLOAT, (4, 3)), tensor("b", FLOAT, (3,))],
        [tensor("y", FLOAT, ("n", 3))],
        {"w": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(3, np.float32)},
        ir_version=3,
        opset=8,
    )


@dataclass(frozen=True)
class Bake(Pass):
    """Replaces an overridable initializer by a constant, and lists it still or not."""

    keep: bool
    name: ClassVar[str] = "bake"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        old = model.graph.initializers["b"]
        assert old.const_value is not None
        new = ir.node("Constant", [], {"value": ir.tensor(old.const_value.numpy())})
        new.outputs[0].name, new.name = "baked", "bake"
        for user, index in list(old.uses()):
            user.replace_input_with(index, new.outputs[0])
        model.graph.insert_before(model.graph[0], new)
        if not self.keep:
            model.graph.inputs.remove(old)
            del model.graph.initializers["b"]
        return PassResult([Change("bake", "b")])


def test_overridable_initializers_stay_overridable() -> None:
    result = apply(overridable(), Bake(keep=False))
    assert result.ledger[0].status == "reverted"
    assert "not to be overridden any more" in str(result.ledger[0].reason)
    result = apply(overridable(), Bake(keep=True))
    assert result.ledger[0].status == "reverted"
    assert "where a caller overrides the initializers" in str(result.ledger[0].reason)
    assert statuses(overridable(), Scale(by=1.0)) == ["changed"]
    assert statuses(overridable(), Scale(by=2.0)) == ["reverted"]


def test_real_samples_and_random_ones_at_another_batch_size() -> None:
    path = ROOT / "fixtures" / "models" / "encoder.onnx"
    model = load(path)
    data = load_data(str(ROOT / "fixtures" / "data" / "encoder.npz"), interface(model)[0])
    verifier = Verifier(model, Context(original=model, data=data))
    assert verifier.unable is None
    assert verifier.description == "4 real samples, a random input, another batch size, extremes"
    assert [len(f["input_ids"]) for f in verifier.feeds] == [1, 1, 1, 1, 1, 3, 16]
    assert all(f["input_ids"].max() < 200 and f["input_ids"].min() >= 0 for f in verifier.feeds[: verifier.ordinary])
    assert -200 <= verifier.feeds[-1]["input_ids"].min() < 0  # from the end of the table, which is legal too


def test_where_random_inputs_do_not_run_real_ones_are_stacked() -> None:
    """A Reshape fits the real length only: the random default of eight does not run."""
    model = model_of(
        [node("Reshape", "x s", "r"), node("Mul", "r w", "y")],
        [tensor("x", FLOAT, ("n", "length"))],
        [tensor("y", FLOAT, ("n", 2, 5))],
        {"s": np.asarray([0, 2, 5], np.int64), "w": np.ones(5, np.float32)},
    )
    data = load_data({"x": np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)}, interface(model)[0])
    verifier = Verifier(model, Context(original=model, data=data))
    assert [f["x"].shape for f in verifier.feeds] == [(1, 10)] * 4 + [(3, 10)]
    assert verifier.description == "4 real samples, another batch size"


def test_longer_inputs_are_tried_where_short_ones_do_not_run() -> None:
    """Reflecting 32 values needs an input longer than that."""
    model = model_of(
        [node("Pad", "x p", "q", mode="reflect"), node("Mul", "q w", "y")],
        [tensor("x", FLOAT, ("n", "samples"))],
        [tensor("y", FLOAT, ("n", "more"))],
        {"p": np.asarray([0, 0, 0, 32], np.int64), "w": np.asarray([1.0], np.float32)},
    )
    feeds = Verifier(model, Context(original=model)).feeds
    assert [f["x"].shape for f in feeds] == [(1, 64), (3, 64), (2, 64), (2, 64)]
    assert statuses(model, Scale(by=1.1)) == ["reverted"]


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (ROOT / "fixtures" / "models").glob("*.onnx") if p.stem != "custom")
)
def test_every_fixture_is_an_exact_copy_of_itself(name: str) -> None:
    model = load(ROOT / "fixtures" / "models" / f"{name}.onnx")
    verifier = Verifier(model, Context(original=model, threads=1))
    assert verifier.unable is None
    assert verifier.violation(clone(model)) is None


@pytest.mark.parametrize("name", ["fakequant", "control", "half", "overridable", "shared", "gru"])
def test_a_weight_changed_anywhere_in_a_fixture_is_seen(name: str) -> None:
    model = load(ROOT / "fixtures" / "models" / f"{name}.onnx")
    verifier = Verifier(model, Context(original=model, threads=1))
    changed = clone(model)
    graphs = [g for g in changed.graphs() if any(_large(v) for v in g.initializers.values())]
    value = next(v for v in graphs[0].initializers.values() if _large(v))
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array * -1.5).astype(array.dtype), name=value.name)
    assert verifier.violation(changed) is not None


def _large(value: ir.Value) -> bool:
    stored = value.const_value
    return stored is not None and stored.dtype.is_floating_point() and stored.size > 8


@pytest.mark.parametrize("name", ["encoder", "shared", "convtranspose", "half", "overridable", "opset11", "lstm"])
def test_our_own_exact_passes_hold(name: str) -> None:
    model = load(ROOT / "fixtures" / "models" / f"{name}.onnx")
    passes = [create(p, {}) for p in ("fold-constants", "fuse-batchnorm", "remove-unused")]
    result = PassManager(passes).run(model, Context(original=model, threads=1))
    assert result.reverted == []


def test_outline_sees_edits_and_no_more() -> None:
    for path in sorted((ROOT / "fixtures" / "models").glob("*.onnx")):
        model = load(path)
        copy = clone(model)
        assert outline(model) == outline(copy)
        first = next(iter(copy.graph))
        first.attributes["extra"] = ir.AttrInt64("extra", 1)
        assert outline(model) != outline(copy)
    model = load(ROOT / "fixtures" / "models" / "control.onnx")
    for edit in ("op", "input", "weight", "body"):
        copy = clone(model)
        inner = [g for g in copy.graphs() if g is not copy.graph]
        if edit == "op":
            next(iter(copy.graph)).op_type = "Other"
        elif edit == "input":
            next(n for n in copy.graph if n.inputs).replace_input_with(0, None)
        elif edit == "weight":
            value = next(v for g in copy.graphs() for v in g.initializers.values())
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        else:
            next(iter(inner[0])).op_type = "Other"
        assert outline(model) != outline(copy), edit


def test_a_number_in_half_precision_is_an_input_like_any_other() -> None:
    """Found by tools/fuzz.py, graph 9059: nothing was compared where one was fed."""
    model = model_of([node("Mul", "x w", "y")], [tensor("x", HALF, ())], [tensor("y", HALF, ())], {"w": np.float16(2)})
    assert Verifier(model, Context(original=model)).unable is None
    assert statuses(model, Scale(by=1.5)) == ["reverted"]


def test_where_no_numbers_can_be_compared_the_interface_is() -> None:
    model = model_of([node("Mystery", "x b", "y", domain="mine")], [tensor("x"), tensor("b", FLOAT, (4,))],
                     [tensor("y")], {"b": np.ones(4, np.float32)})  # fmt: skip
    model.opset_imports["mine"] = 1
    result = apply(model, Bake(keep=False))
    assert [e.status for e in result.ledger] == ["reverted"]
    assert "not to be overridden any more" in str(result.ledger[0].reason)
    assert any(note.startswith("not compared numerically") for note in result.notes)


@dataclass(frozen=True)
class Forget(Pass):
    """Says that it is exact, and leaves an operator that there is not."""

    name: ClassVar[str] = "forget"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        next(iter(model.graph)).op_type = "GatherWhat"
        return PassResult(changes=[Change("forget", "the first node")])


def test_what_runs_on_no_input_we_have_must_still_load() -> None:
    """Found by the conformance run: a branch that inference sees only once a condition is known."""
    model = model_of([node("Gather", "x i", "y")], [tensor("x", FLOAT, ("N",))], [tensor("y", FLOAT, ())],
                     {"i": np.int64(10**6)})  # fmt: skip
    verifier = Verifier(model, Context(original=model))
    assert verifier.unable is not None
    assert verifier.loads
    result = PassManager([Forget()]).run(model)
    assert [e.status for e in result.ledger] == ["reverted"]
    assert "load" in (result.ledger[0].reason or "")
