"""A wrong pass ends with the right model, and the ledger says what happened."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import recipe, verify
from graphopt.base import Change, Context, Contract, Pass, PassResult, Repeat, Skip
from graphopt.errors import DataError, InputError, PreconditionError
from graphopt.ledger import LedgerEntry
from graphopt.manager import MAX_GUILTY_SITES, PassManager, first_true
from graphopt.model import fingerprint, load, to_proto
from graphopt.passes.remove_unused import RemoveUnused

ROOT = Path(__file__).resolve().parent.parent
Feeds = dict[str, Any]


@pytest.fixture(autouse=True)
def _reproducers_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def weights(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    rng = np.random.default_rng([seed, len(name), *shape])
    return numpy_helper.from_array(rng.normal(0, 0.5, shape).astype(np.float32), name)


def net(*, batch: str | int = "batch") -> onnx.ModelProto:
    """An image classifier with one of everything that the wrong passes below get wrong."""
    nodes = [
        helper.make_node("Identity", ["image"], ["copied"], name="copy"),
        helper.make_node("Conv", ["copied", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["copied", "w2"], ["c2"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Sub", ["r1", "c2"], ["s"], name="sub"),
        helper.make_node("LeakyRelu", ["s"], ["l"], name="leaky", alpha=0.3),
        helper.make_node("Exp", ["s"], ["dead"], name="unread"),
        helper.make_node("GlobalAveragePool", ["l"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["logits"], name="gemm"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
        helper.make_node("ArgMax", ["logits"], ["winner"], name="argmax", axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 2, 6, 6])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, 5]),
            helper.make_tensor_value_info("winner", TensorProto.INT64, [batch]),
        ],
        [weights("w1", 4, 2, 3, 3), weights("b1", 4), weights("w2", 4, 2, 3, 3, seed=1), weights("w3", 4, 5)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def simple(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, int, list[Any]]],
    outputs: list[tuple[str, int, list[Any]]],
    tensors: list[onnx.TensorProto] | None = None,
    *,
    ir_version: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "simple",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        tensors or [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


def run(model: ir.Model, feeds: Feeds) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_proto(model).SerializeToString(), options)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def images(count: int) -> Feeds:
    return {"image": np.random.default_rng(count).normal(size=(count, 2, 6, 6)).astype(np.float32)}


def same(a: ir.Model, b: ir.Model, feeds: Feeds) -> bool:
    first, second = run(a, feeds), run(b, feeds)
    return list(first) == list(second) and all(
        first[k].dtype == second[k].dtype
        and first[k].shape == second[k].shape
        and (
            np.allclose(first[k], second[k], rtol=1e-4, atol=1e-5, equal_nan=True)
            if first[k].dtype.kind == "f"
            else np.array_equal(first[k], second[k])
        )
        for k in first
    )


def named(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def set_weight(model: ir.Model, name: str, change: Callable[[Any], Any]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor(change(array).astype(array.dtype), name=name)


def after(model: ir.Model, value: ir.Value, op_type: str, more: list[ir.Value | None], **attributes: Any) -> ir.Node:
    """Put a node between a value and all that reads it."""
    node = ir.node(op_type, [value, *more], attributes=attributes or None)
    node.name, node.outputs[0].name = f"{value.name}_{op_type}", f"{value.name}_{op_type}_out"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    value.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    node.replace_input_with(0, value)
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return node


def add_constant(model: ir.Model, name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def only_first_row(model: ir.Model) -> None:
    """logits * 0 + logits[0:1]: right as long as the batch is one."""
    logits = named(model, "gemm").outputs[0]
    sliced = after(
        model,
        logits,
        "Slice",
        [add_constant(model, n, np.asarray([v])) for n, v in (("from", 0), ("to", 1), ("on", 0))],
    ).outputs[0]
    zero = ir.node("Mul", [logits, add_constant(model, "zero", np.float32(0))])
    zero.name, zero.outputs[0].name = "zero_mul", "zero_out"
    whole = after(model, sliced, "Add", [zero.outputs[0]])
    model.graph.insert_before(whole, zero)


def undefined(model: ir.Model) -> None:
    named(model, "relu").replace_input_with(0, ir.Value(name="from_nowhere"))


def cycle(model: ir.Model) -> None:
    named(model, "relu").replace_input_with(0, named(model, "sub").outputs[0])


def write_into_the_weights(model: ir.Model) -> None:
    tensor = model.graph.initializers["w1"].const_value
    assert tensor is not None
    tensor.numpy()[:] = 0


def wrong_dtype(model: ir.Model) -> None:
    argmax = named(model, "argmax")
    cast = after(model, argmax.outputs[0], "Cast", [], to=int(ir.DataType.INT32))
    cast.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    argmax.outputs[0].name, cast.outputs[0].name = "winner_64", "winner"


def swap_sub(model: ir.Model) -> None:
    sub = named(model, "sub")
    a, b = sub.inputs
    sub.replace_input_with(0, b)
    sub.replace_input_with(1, a)


def drop_relu(model: ir.Model) -> None:
    relu = named(model, "relu")
    relu.outputs[0].replace_all_uses_with(relu.inputs[0])  # type: ignore[arg-type]
    model.graph.remove([relu], safe=True)


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "renamed"


def fixed_batch(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([1, 2, 6, 6])


def raises(model: ir.Model) -> None:
    set_weight(model, "w1", lambda w: w * 2)  # half done already
    raise RuntimeError("no such thing\nas a second line")


def attr(node: ir.Node, name: str, value: Any) -> None:
    kind = ir.AttrInt64s if isinstance(value, list) else ir.AttrInt64
    node.attributes[name] = kind(name, value)


WRONG: dict[str, tuple[Callable[[ir.Model], Any], str]] = {
    "weight": (lambda m: set_weight(m, "w3", lambda w: w + (np.arange(w.size) == 7).reshape(w.shape)), "max abs diff"),
    "small-weight": (lambda m: set_weight(m, "w1", lambda w: w * 1.001), "max abs diff"),
    "axis": (lambda m: attr(named(m, "softmax"), "axis", 0), "max abs diff"),
    "attribute": (lambda m: named(m, "leaky").attributes.pop("alpha"), "max abs diff"),
    "dtype": (wrong_dtype, "names or types"),
    "pad": (lambda m: attr(named(m, "conv1"), "pads", [0, 0, 2, 2]), "max abs diff"),
    "nan": (lambda m: after(m, m.graph.inputs[0], "Log", []), "NaN or Inf"),
    "batch": (only_first_row, "max abs diff"),
    "fixed-batch": (fixed_batch, "ONNX Runtime cannot run"),
    "renamed-output": (rename_output, "names or types"),
    "dropped-output": (lambda m: m.graph.outputs.pop(), "names or types"),
    "swapped-outputs": (lambda m: m.graph.outputs.reverse(), "names or types"),
    "undefined": (undefined, "broken graph"),
    "cycle": (cycle, "broken graph"),
    "raises": (raises, "it crashed: RuntimeError: no such thing as a second line"),
    "weights-in-place": (write_into_the_weights, "it crashed: ValueError"),
    "input-error": (lambda m: (_ for _ in ()).throw(InputError("cannot be")), "cannot be"),
    "negative": (lambda m: after(m, m.graph.inputs[0], "Abs", []), "max abs diff"),
    "swapped-sub": (swap_sub, "max abs diff"),
    "dropped-relu": (drop_relu, "max abs diff"),
    "wrong-winner": (lambda m: attr(named(m, "argmax"), "select_last_index", 1), ""),
    "keepdims": (lambda m: attr(named(m, "argmax"), "keepdims", 1), r"int64\[1, 1\] instead of int64\[1\]|cannot load"),
    "not-loadable": (lambda m: attr(named(m, "conv1"), "group", 3), "ONNX Runtime cannot"),
}
SILENT = {"weight", "dtype", "axis", "dropped-relu"}
HARMLESS = {"wrong-winner"}  # without ties the last of the largest is the first
CRASHING = {"undefined", "cycle", "raises", "weights-in-place", "input-error"}


@dataclass(frozen=True)
class Wrong(Pass):
    """A pass with a mistake."""

    kind: str
    silent: bool = False
    name: ClassVar[str] = "wrong"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        WRONG[self.kind][0](model)
        return PassResult() if self.silent else PassResult([Change("break", "(graph)", self.kind)])


@dataclass(frozen=True)
class DropIdentities(Pass):
    """A good pass."""

    name: ClassVar[str] = "drop-identities"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        for node in [n for n in model.graph if n.op_type == "Identity" and not n.outputs[0].is_graph_output()]:
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
            model.graph.remove([node], safe=True)
            result.changes.append(Change("eliminate", str(node.name)))
        return result


def check_kept(original: ir.Model, result: ir.Model, *counts: int) -> None:
    for count in counts or (1, 3, 5):
        assert same(original, result, images(count))


@pytest.mark.parametrize("verify", ["end", "each"])
@pytest.mark.parametrize("kind", [k for k in WRONG if k not in HARMLESS])
def test_a_wrong_pass_is_reverted_and_its_neighbours_are_kept(kind: str, verify: str) -> None:
    original = load(net())
    before = fingerprint(original)
    result = PassManager([DropIdentities(), Wrong(kind), RemoveUnused()], verify=verify).run(original)
    check_kept(original, result.model)
    good, wrong, also_good = result.ledger
    assert wrong.status == "reverted"
    assert wrong.reason is not None
    assert wrong.reason.startswith("reverted: ")
    assert "\n" not in wrong.reason
    assert re.search(WRONG[kind][1], wrong.reason), wrong.reason
    assert wrong.changes == []
    assert wrong.nodes[0] == wrong.nodes[1]
    assert (good.status, also_good.status) == ("changed", "changed")
    assert "Identity" not in ops(result.model)
    assert "Exp" not in ops(result.model)
    assert ops(result.model) == [o for o in ops(original) if o not in ("Identity", "Exp")]
    assert result.reverted == [wrong]
    assert fingerprint(original) == before


@pytest.mark.parametrize("kind", [k for k in WRONG if k not in HARMLESS])
def test_the_reproducer_reproduces(kind: str) -> None:
    original = load(net())
    result = PassManager([DropIdentities(), Wrong(kind), RemoveUnused()]).run(original)
    folder = result.reproducer
    assert folder is not None
    assert folder == result.ledger[1].reproducer
    told = recipe.read(folder / "recipe.toml")
    assert told.passes == (Wrong(kind),)
    assert told.model == str(folder / "before.onnx")
    assert WRONG[kind][1][:8] in (folder / "recipe.toml").read_text().splitlines()[0] or "|" in WRONG[kind][1]
    before = load(folder / "before.onnx")
    assert "Identity" not in ops(before)  # what ran before it, ran
    if kind in CRASHING:
        again = PassManager(told.passes, verify="off").run(before)
        assert again.ledger[0].status == "reverted"
        return
    again = PassManager(told.passes, verify="off").run(before)
    assert again.ledger[0].status == "changed"
    with np.load(folder / "feed_0.npz") as data:
        feed = dict(data)
    try:
        reproduced = not same(before, again.model, feed)
    except Exception:  # ONNX Runtime has no public base of its errors
        reproduced = True
    assert reproduced


@dataclass(frozen=True)
class Refuses(Pass):
    """A pass that has no business here."""

    name: ClassVar[str] = "refuses"
    contract: ClassVar[Contract] = "approximate"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        raise PreconditionError("refuses: not this model; give another")


def test_a_run_that_fails_tells_of_no_reproducer_and_leaves_none(tmp_path: Path) -> None:
    pipeline = [Wrong("swapped-sub"), Refuses()]
    assert PassManager(pipeline).run(load(net())).reproducer is not None
    assert len(list(tmp_path.glob("graphopt-repro-*"))) == 1
    with pytest.raises(PreconditionError):
        PassManager(pipeline, raise_preconditions=True).run(load(net()))
    assert len(list(tmp_path.glob("graphopt-repro-*"))) == 1


def test_a_pass_that_is_not_wrong_after_all_is_kept() -> None:
    original = load(net())
    result = PassManager([Wrong("wrong-winner")]).run(original)
    assert result.ledger[0].status == "changed"
    assert result.reproducer is None
    probes = "a random input, another batch size, extremes, NaN and infinities"
    assert result.notes == [f"exact passes compared with the original on {probes}"]


@pytest.mark.parametrize("kind", sorted(SILENT))
def test_a_pass_that_edits_without_saying_so_is_noticed(kind: str) -> None:
    original = load(net())
    result = PassManager([DropIdentities(), Wrong(kind, silent=True)]).run(original)
    check_kept(original, result.model)
    assert result.ledger[1].status == "reverted"


def test_a_silent_edit_that_is_right_is_on_record() -> None:
    @dataclass(frozen=True)
    class Quiet(DropIdentities):
        def run(self, model: ir.Model, context: Context) -> PassResult:
            super().run(model, context)
            return PassResult()

    result = PassManager([Quiet()]).run(load(net()))
    assert result.ledger[0].status == "changed"
    assert result.ledger[0].changes[0].detail == "changed, but the pass did not say what"


def test_a_pass_that_touches_nothing_is_unchanged() -> None:
    for name in ("control", "encoder", "metadata", "fakequant"):
        model = load(ROOT / "fixtures" / "models" / f"{name}.onnx")

        @dataclass(frozen=True)
        class Nothing(Pass):
            name: ClassVar[str] = "nothing"
            contract: ClassVar[Contract] = "exact"

            def run(self, model: ir.Model, context: Context) -> PassResult:
                return PassResult(skipped=[Skip("(graph)", "nothing to do")])

        result = PassManager([Nothing()]).run(model)
        assert result.ledger[0].status == "unchanged"
        assert fingerprint(result.model) == fingerprint(model)


def test_two_wrong_passes_are_both_found() -> None:
    original = load(net())
    pipeline = [
        Wrong("weight"), DropIdentities(), Wrong("axis"), RemoveUnused(), Wrong("raises"), Wrong("dropped-relu")
    ]  # fmt: skip
    for mode in ("end", "each"):
        result = PassManager(pipeline, verify=mode).run(original)
        assert [e.status for e in result.ledger] == [
            "reverted", "changed", "reverted", "changed", "reverted", "reverted"
        ]  # fmt: skip
        check_kept(original, result.model)
        assert len({e.reproducer for e in result.reverted}) == 4


def test_what_depended_on_the_wrong_pass_is_run_again_without_it() -> None:
    """The second pass needs what the wrong one made; alone it finds nothing to do."""

    @dataclass(frozen=True)
    class NeedsAbs(Pass):
        name: ClassVar[str] = "needs-abs"
        contract: ClassVar[Contract] = "exact"

        def check(self, model: ir.Model) -> None:
            if "Abs" not in ops(model):
                raise PreconditionError("there is no Abs; run wrong first")

        def run(self, model: ir.Model, context: Context) -> PassResult:
            node = next(n for n in model.graph if n.op_type == "Abs")
            after(model, node.outputs[0], "Identity", [])
            return PassResult([Change("insert", str(node.name))])

    original = load(net())
    result = PassManager([Wrong("negative"), NeedsAbs(), RemoveUnused()]).run(original)
    assert [e.status for e in result.ledger] == ["reverted", "skipped", "changed"]
    assert result.ledger[1].changes == []
    check_kept(original, result.model)


# --- rewrites of one pass, one by one ---


@dataclass(frozen=True)
class Merge(Pass):
    """Halves every weight and doubles what follows, with mistakes at some sites."""

    wrong: tuple[str, ...] = ()
    asks: bool = True
    name: ClassVar[str] = "merge"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        for node in [n for n in model.graph if n.op_type == "Mul"]:
            site = str(node.name)
            if self.asks and not context.allows(self.name, site):
                result.skipped.append(Skip(site, "switched off after a failed verification"))
                continue
            node.replace_input_with(1, model.graph.initializers["wrong" if site in self.wrong else "right"])
            result.changes.append(Change("merge", site))
        return result


def chain(count: int) -> onnx.ModelProto:
    """``count`` multiplications by two; the initializers "right" (also two) and "wrong" are read by nothing."""
    nodes = [helper.make_node("Mul", [f"v{i}", "two"], [f"v{i + 1}"], name=f"mul{i}") for i in range(count)]
    tensors = [numpy_helper.from_array(np.float32(v), n) for n, v in (("two", 1.01), ("right", 1.01), ("wrong", 1.02))]
    return simple(nodes, [("v0", 1, ["n", 3])], [(f"v{count}", 1, ["n", 3])], tensors)


def of(model: ir.Model, initializer: str) -> set[str]:
    return {str(n.name) for n in model.graph if n.inputs[1] is model.graph.initializers[initializer]}


@pytest.mark.parametrize("verify", ["end", "each"])
@pytest.mark.parametrize("wrong", [("mul0",), ("mul15",), ("mul3", "mul4"), ("mul2", "mul9", "mul14")])
def test_only_the_wrong_rewrites_are_reverted(wrong: tuple[str, ...], verify: str) -> None:
    original = load(chain(16))
    result = PassManager([Merge(wrong)], verify=verify).run(original)
    entry = result.ledger[0]
    assert entry.status == "partly reverted"
    assert entry.reason is not None
    assert entry.reason.startswith("reverted: output 'v16': max abs diff")
    assert f"(by the rewrite at {', '.join(wrong)})" in entry.reason
    assert len(entry.changes) == 16 - len(wrong)
    assert {s.site for s in entry.skipped} == set(wrong)
    assert len(entry.skipped) == len(wrong)
    assert all(s.reason.startswith("reverted: ") for s in entry.skipped)
    assert of(result.model, "two") == set(wrong)
    assert of(result.model, "wrong") == set()
    assert entry.reproducer is not None
    assert result.reverted == [entry]


def test_a_pass_that_never_asks_is_reverted_whole() -> None:
    result = PassManager([Merge(("mul3",), asks=False)]).run(load(chain(16)))
    assert result.ledger[0].status == "reverted"
    assert of(result.model, "two") == {f"mul{i}" for i in range(16)}


@pytest.mark.parametrize("count", [MAX_GUILTY_SITES + 1, 12, 16])
def test_too_many_wrong_rewrites_are_a_wrong_pass(count: int) -> None:
    result = PassManager([Merge(tuple(f"mul{i}" for i in range(count)))]).run(load(chain(16)))
    assert result.ledger[0].status == "reverted"


def test_all_sites_wrong_is_reverted_not_partly() -> None:
    result = PassManager([Merge(("mul0", "mul1"))]).run(load(chain(2)))
    assert result.ledger[0].status == "reverted"


def test_a_bad_site_among_passes_with_a_bad_neighbour() -> None:
    original = load(net())
    result = PassManager([DropIdentities(), Merge(), Wrong("weight"), RemoveUnused()]).run(original)
    assert [e.status for e in result.ledger] == ["changed", "unchanged", "reverted", "changed"]
    original = load(chain(16))

    @dataclass(frozen=True)
    class Double(Pass):
        name: ClassVar[str] = "double"
        contract: ClassVar[Contract] = "exact"

        def run(self, model: ir.Model, context: Context) -> PassResult:
            set_weight(model, "two", lambda w: w * 2)
            return PassResult([Change("break", "two")])

    # Merging everything hides the mistake of the first; it is found all the same when it is looked for.
    result = PassManager([Double(), Merge(("mul5",)), Repeat((RemoveUnused(),), 3)]).run(original)
    assert [e.status for e in result.ledger][:2] == ["reverted", "partly reverted"]
    feed = {"v0": np.ones((2, 3), np.float32)}
    assert same(original, result.model, feed)


class Counting:
    """ONNX Runtime, with a count of the models loaded."""

    loads = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        type(self).loads += 1
        self.inner = verify_session(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


verify_session = verify.Session


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    Counting.loads = 0
    monkeypatch.setattr(verify, "Session", Counting)
    return Counting


def loads(pipeline: list[Any], size: int, counted: type[Counting]) -> int:
    counted.loads = 0
    PassManager(pipeline).run(load(chain(size)))
    return counted.loads


def test_the_number_of_loads_grows_with_the_logarithm_of_the_sites(counted: type[Counting]) -> None:
    few, many = (loads([Merge((f"mul{size // 2}",))], size, counted) for size in (8, 128))
    assert few <= 16
    assert many - few <= 2 * 4 + 1  # four more halvings, each at most two loads


def test_the_number_of_loads_grows_with_the_logarithm_of_the_passes(counted: type[Counting]) -> None:
    @dataclass(frozen=True)
    class Step(Pass):
        number: int = 0
        wrong: bool = False
        name: ClassVar[str] = "step"
        contract: ClassVar[Contract] = "exact"

        def run(self, model: ir.Model, context: Context) -> PassResult:
            model.graph[self.number].replace_input_with(1, model.graph.initializers["wrong" if self.wrong else "right"])
            return PassResult([Change("step", str(self.number))])

    clean = loads([Step(i) for i in range(64)], 64, counted)
    assert clean == 2 + 2  # the reference and the result, each with optimizations off and on
    dirty = loads([Step(i, i == 40) for i in range(64)], 64, counted)
    assert dirty <= clean + 2 * 6 + 1 + 2 + 1


@pytest.mark.parametrize("high", [1, 2, 3, 7, 100])
def test_first_true_finds_the_step_where_it_turns(high: int) -> None:
    for wanted in range(1, high + 1):
        asked: list[int] = []

        def holds(n: int, wanted: int = wanted, asked: list[int] = asked) -> bool:
            asked.append(n)
            return n >= wanted

        assert first_true(0, high, holds) == wanted
        assert len(asked) <= int(np.ceil(np.log2(high)))


# --- modes ---


def test_off_checks_structure_only() -> None:
    original = load(net())
    result = PassManager([Wrong("weight"), Wrong("cycle")], verify="off").run(original)
    assert [e.status for e in result.ledger] == ["changed", "reverted"]
    assert not same(original, result.model, images(1))
    assert result.notes == []
    with pytest.raises(ValueError, match="end, each, off"):
        PassManager([], verify="sometimes")


def test_each_compares_after_every_pass(counted: type[Counting]) -> None:
    pipeline = [DropIdentities(), RemoveUnused(), Wrong("weight")]
    PassManager(pipeline, verify="each").run(load(net()))
    each = counted.loads
    assert each == 2 + 2 + 2 + 1  # the reference; two good passes; a wrong one, without which it is as it was
    counted.loads = 0
    PassManager([DropIdentities(), RemoveUnused()]).run(load(net()))
    assert counted.loads == 4
    counted.loads = 0
    PassManager(pipeline, verify="off").run(load(net()))
    assert counted.loads == 0


@dataclass(frozen=True)
class Coarse(Pass):
    """An approximate pass: rounds w3, or does worse."""

    mistake: str = ""
    name: ClassVar[str] = "coarse"
    contract: ClassVar[Contract] = "approximate"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        set_weight(model, "w3", lambda w: np.round(w, 1))
        if self.mistake == "crash":
            raise ZeroDivisionError("by zero")
        if self.mistake == "data":
            raise DataError("sample 3 is of no use")
        if self.mistake == "cycle":
            cycle(model)
        return PassResult([Change("round", "w3")], metrics={"seen": ops(model)})


def test_approximate_passes_are_not_judged_but_exact_ones_around_them_are() -> None:
    original = load(net())
    result = PassManager([Wrong("dropped-relu"), Coarse(), DropIdentities(), Wrong("axis")]).run(original)
    assert [e.status for e in result.ledger] == ["reverted", "changed", "changed", "reverted"]
    assert "Relu" in result.ledger[1].metrics["seen"]  # the wrong pass was undone before it ran
    rounded = np.round(np.asarray(numpy_helper.to_array(weights("w3", 4, 5))), 1)
    tensor = result.model.graph.initializers["w3"].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), rounded)
    assert [n.split(" on ")[0] for n in result.notes] == [
        "exact passes compared with the original",
        "exact passes compared with the model before them",
    ]


@pytest.mark.parametrize("mistake", ["crash", "cycle"])
def test_a_broken_approximate_pass_is_undone(mistake: str) -> None:
    original = load(net())
    result = PassManager([DropIdentities(), Coarse(mistake), RemoveUnused()]).run(original)
    assert [e.status for e in result.ledger] == ["changed", "reverted", "changed"]
    check_kept(original, result.model)
    assert str(result.ledger[1].reason).startswith("reverted: ")
    assert result.reproducer is not None


def test_bad_data_is_the_users_business_not_the_passs() -> None:
    with pytest.raises(DataError, match="sample 3"):
        PassManager([Coarse("data")]).run(load(net()))


@dataclass(frozen=True)
class Picky(Pass):
    """Never content."""

    name: ClassVar[str] = "picky"
    contract: ClassVar[Contract] = "exact"

    def check(self, model: ir.Model) -> None:
        raise PreconditionError("node 'gemm' is no Conv; run another pass first")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        raise AssertionError("not to be run")


def test_preconditions_skip_in_a_pipeline_and_raise_where_asked() -> None:
    result = PassManager([DropIdentities(), Picky(), RemoveUnused()]).run(load(net()))
    assert [e.status for e in result.ledger] == ["changed", "skipped", "changed"]
    assert result.ledger[1].reason == "node 'gemm' is no Conv; run another pass first"
    assert result.reproducer is None
    for wanted in (True, ("picky",)):
        with pytest.raises(PreconditionError, match="run another pass first"):
            PassManager([Picky()], raise_preconditions=wanted).run(load(net()))
    result = PassManager([Picky()], raise_preconditions=("other",)).run(load(net()))
    assert result.ledger[0].status == "skipped"


def test_a_pass_without_its_data_is_skipped() -> None:
    @dataclass(frozen=True)
    class Calibrated(Pass):
        name: ClassVar[str] = "calibrated"
        contract: ClassVar[Contract] = "approximate"

        def run(self, model: ir.Model, context: Context) -> PassResult:
            context.statistics(model, ["c1"], histograms=False)
            return PassResult()

    result = PassManager([Calibrated()]).run(load(net()))
    assert result.ledger[0].status == "skipped"
    assert "--data FILE" in str(result.ledger[0].reason)


# --- repeat ---


@dataclass(frozen=True)
class OneMul(Pass):
    """Merges one multiplication at a time."""

    never_done: bool = False
    name: ClassVar[str] = "one-mul"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        for node in model.graph:
            if node.inputs[1] is model.graph.initializers["two"]:
                node.replace_input_with(1, model.graph.initializers["right"])
                return PassResult([Change("merge", str(node.name))])
        return PassResult([Change("merge", "again")] if self.never_done else [])


@pytest.mark.parametrize("verify", ["end", "each"])
def test_repeat_stops_at_a_fixpoint_and_is_bounded(verify: str) -> None:
    result = PassManager([Repeat((OneMul(),), 9)], verify=verify).run(load(chain(3)))
    assert [e.status for e in result.ledger] == ["changed"] * 3  # the round that found nothing has no entry
    result = PassManager([Repeat((OneMul(),), 2)], verify=verify).run(load(chain(3)))
    assert len(result.ledger) == 2
    result = PassManager([Repeat((OneMul(never_done=True),), 5)], verify=verify).run(load(chain(3)))
    assert len(result.ledger) == 5
    with pytest.raises(ValueError, match="at least one"):
        Repeat((), 3)


@pytest.mark.parametrize("verify", ["end", "each"])
def test_a_wrong_pass_in_a_repeat_is_tried_once(verify: str) -> None:
    original = load(net())
    result = PassManager([Repeat((Wrong("weight"), DropIdentities(), RemoveUnused()), 4)], verify=verify).run(original)
    check_kept(original, result.model)
    statuses = [e.status for e in result.ledger if e.name == "wrong"]
    assert statuses[0] == "reverted"
    assert all(s in ("skipped", "reverted") for s in statuses)
    if verify == "each":
        assert statuses == ["reverted", "skipped"]
        assert result.ledger[3].reason == "it was reverted earlier in this run"


@pytest.mark.parametrize("verify", ["end", "each"])
def test_a_partly_wrong_pass_in_a_repeat_keeps_its_good_rewrites(verify: str) -> None:
    result = PassManager([Repeat((Merge(("mul3",)),), 3)], verify=verify).run(load(chain(6)))
    assert result.ledger[0].status == "partly reverted"
    assert of(result.model, "two") == {"mul3"}
    assert of(result.model, "wrong") == set()


# --- nothing stays ---


def summary(entry: LedgerEntry) -> dict[str, Any]:
    told = entry.as_dict()
    return {k: v for k, v in told.items() if k not in ("seconds", "reproducer")}


def test_two_runs_are_equal_and_nothing_stays_behind() -> None:
    original = load(chain(8))
    context = Context(original=original)
    passes = [Merge(("mul3",)), RemoveUnused()]
    manager = PassManager(passes)
    before = [dataclasses.asdict(p) for p in passes], fingerprint(original)
    first, second = manager.run(original, context), manager.run(original, context)
    assert [summary(e) for e in first.ledger] == [summary(e) for e in second.ledger]
    assert fingerprint(first.model) == fingerprint(second.model)
    assert first.notes == second.notes
    assert context.disabled == frozenset()
    assert ([dataclasses.asdict(p) for p in passes], fingerprint(original)) == before


def test_what_the_caller_switched_off_stays_off() -> None:
    original = load(chain(4))
    context = Context(original=original, disabled={("merge", "mul1")})
    result = PassManager([Merge(("mul2",))]).run(original, context)
    assert of(result.model, "two") == {"mul1", "mul2"}


def test_not_even_a_pass_that_edits_the_original_touches_the_callers_model() -> None:
    @dataclass(frozen=True)
    class Rude(Pass):
        name: ClassVar[str] = "rude"
        contract: ClassVar[Contract] = "exact"

        def run(self, model: ir.Model, context: Context) -> PassResult:
            set_weight(context.original, "w1", lambda w: w * 0)
            return PassResult()

    original = load(net())
    before = fingerprint(original)
    PassManager([Rude()]).run(original)
    assert fingerprint(original) == before


def test_an_answer_that_is_no_result_is_a_crash() -> None:
    @dataclass(frozen=True)
    class Mute(Pass):
        name: ClassVar[str] = "mute"
        contract: ClassVar[Contract] = "exact"

        def run(self, model: ir.Model, context: Context) -> PassResult:
            return None  # type: ignore[return-value]

    result = PassManager([Mute()]).run(load(net()))
    assert "returned a NoneType, not a PassResult" in str(result.ledger[0].reason)


def test_the_ledger_can_be_printed_as_json() -> None:
    result = PassManager([DropIdentities(), Wrong("axis"), Wrong("raises"), Picky()]).run(load(net()))
    told = json.loads(json.dumps([e.as_dict() for e in result.ledger]))
    assert [t["status"] for t in told] == ["changed", "reverted", "reverted", "skipped"]
    assert told[0]["changes"] == [{"action": "eliminate", "site": "copy", "detail": ""}]
    assert told[0]["nodes"] == [12, 11]
    assert told[1]["options"] == {"kind": "axis"}
    assert told[1]["reproducer"].startswith("/")


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*WRONG, "good", "tidy", "coarse"]), min_size=1, max_size=6),
    st.sampled_from(["end", "each"]),
)
def test_any_mixture_of_right_and_wrong_ends_right(kinds: list[str], verify: str) -> None:
    """Whatever is in the pipeline: the wrong is out, the good is in, and every pass is in the ledger once."""
    good: dict[str, Pass] = {"good": DropIdentities(), "tidy": RemoveUnused(), "coarse": Coarse()}
    original = load(net())
    result = PassManager([good.get(k) or Wrong(k) for k in kinds], verify=verify).run(original)
    assert len(result.ledger) == len(kinds)
    for kind, entry in zip(kinds, result.ledger, strict=True):
        if kind in good or kind in HARMLESS:
            assert entry.status in ("changed", "unchanged")
        elif verify == "each":  # at the end, mistakes that undo each other are none (swapping twice)
            assert entry.status in ("reverted", "skipped")
            assert entry.reason
    reference = original
    if "coarse" in kinds:
        reference = PassManager([Coarse()]).run(original).model
    check_kept(reference, result.model)
    assert ("Identity" in ops(result.model)) == ("good" not in kinds)
    assert ("Exp" in ops(result.model)) == ("tidy" not in kinds)
