"""Two models aligned by structure: whatever is renamed, moved, inserted or fused, what computes the same is found."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import builders
import onnx
import pytest
from onnx import helper

from graphopt.align import align
from graphopt.errors import InputError, ModelError

ROOT = Path(__file__).resolve().parent.parent
MODELS = [*sorted((ROOT / "fixtures" / "models").glob("*.onnx")), ROOT / "graphopt" / "demo" / "digits.onnx"]


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def renamed(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Other names for all nodes and inner values, those of bodies and functions too; another legal order."""
    copy, rng = copied(model), random.Random(seed)
    kept = {v.name for v in (*copy.graph.input, *copy.graph.output)}
    _rename(copy.graph, {}, kept, rng)
    for function in copy.functions:
        _rename(function, {}, set(), rng)
    return copy


def _rename(
    graph: onnx.GraphProto | onnx.FunctionProto, outer: dict[str, str], kept: set[str], rng: random.Random
) -> None:
    names = dict(outer)
    function = isinstance(graph, onnx.FunctionProto)

    def new(name: str) -> str:
        if name and name not in kept:
            names[name] = f"{rng.choice('abc')}{rng.getrandbits(48):x}"
        return names.get(name, name)

    if function:
        graph.input[:] = [new(name) for name in graph.input]
    else:
        graph.name = f"g{rng.getrandbits(16)}"
        for value in graph.input:
            names.pop(value.name, None)
            value.name = new(value.name)
        for tensor in (*graph.initializer, *(s.values for s in graph.sparse_initializer)):
            tensor.name = new(tensor.name) if tensor.name not in names or tensor.name in outer else names[tensor.name]
    for node in graph.node:
        node.name = f"n{rng.getrandbits(48):x}"
        node.output[:] = [new(name) for name in node.output]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                _rename(body, names, set(), rng)
    for value in [*graph.value_info, *([] if function else graph.output)]:
        value.name = names.get(value.name, value.name)
    if function:
        graph.output[:] = [names.get(name, name) for name in graph.output]
    else:
        for one in graph.quantization_annotation:
            one.tensor_name = names.get(one.tensor_name, one.tensor_name)
            for entry in one.quant_parameter_tensor_names:
                entry.value = names.get(entry.value, entry.value)
        _shuffle(graph.initializer, rng)
    _shuffle(graph.value_info, rng)
    _reorder(graph, rng)


def _shuffle(field: object, rng: random.Random) -> None:
    items = list(field)  # type: ignore[call-overload]
    rng.shuffle(items)
    del field[:]  # type: ignore[attr-defined]
    field.extend(items)  # type: ignore[attr-defined]


def reads(node: onnx.NodeProto) -> set[str]:
    """All names a node and its bodies mention; one too many does no harm."""
    found = set(node.input)
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs]:
            found |= {name for inner in body.node for name in reads(inner)} | {v.name for v in body.output}
    return found


def _reorder(graph: onnx.GraphProto | onnx.FunctionProto, rng: random.Random) -> None:
    made = {name for node in graph.node for name in node.output if name}
    left, done, order = list(graph.node), set[str](), []
    while left:
        ready = [k for k, node in enumerate(left) if not (reads(node) & made) - done]
        node = left.pop(rng.choice(ready))
        done.update(node.output)
        order.append(node)
    del graph.node[:]
    graph.node.extend(order)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_node_and_value_is_found_again(path: Path, seed: int) -> None:
    model = onnx.load(path)
    other = renamed(model, seed)
    found = align(model, other)
    assert len(found.nodes) == len(model.graph.node) == len(set(found.nodes.values()))
    assert set(found.how.values()) == {"same"}
    for i, j in found.nodes.items():
        mine, theirs = model.graph.node[i], other.graph.node[j]
        assert mine.op_type == theirs.op_type
        assert [found.values.get(name, "") for name in mine.input] == list(theirs.input)
        assert [found.values.get(name, "") for name in mine.output] == list(theirs.output)


def test_a_changed_weight_hides_nothing() -> None:
    a, b = builders.mlp(), renamed(builders.mlp(seed=1))
    found = align(a, b)
    assert found.nodes == {0: 0, 1: 1, 2: 2}
    assert found.how["x"] == "same"
    assert {found.how[name] for name in ("w1", "h", "a", "y")} == {"structure"}


def test_inserted_node_has_no_counterpart_and_its_neighbours_keep_theirs() -> None:
    a, b = builders.mlp(), builders.mlp()
    b.graph.node.insert(1, helper.make_node("Identity", ["h"], ["i"], name="new"))
    b.graph.node[2].input[0] = "i"
    found = align(a, renamed(b))
    assert len(found.nodes) == 3
    assert set(found.nodes) == {0, 1, 2}
    back = align(renamed(b), a)
    assert len(back.nodes) == 3
    assert found.how["y"] == "node"


def test_fused_batchnorm_gives_its_output_to_the_conv() -> None:
    model = onnx.load(ROOT / "fixtures" / "models" / "convtranspose.onnx")
    graph = model.graph
    norm = next(node for node in graph.node if node.op_type == "BatchNormalization")
    conv = next(node for node in graph.node if norm.input[0] in node.output)
    fused = copied(model)
    target = next(node for node in fused.graph.node if node.output[0] == conv.output[0])
    target.output[0] = norm.output[0]
    kept = [
        node for node in fused.graph.node if node.op_type != "BatchNormalization" or node.output[0] != norm.output[0]
    ]
    del fused.graph.node[:]
    fused.graph.node.extend(kept)
    for tensor in fused.graph.initializer:
        if tensor.name == target.input[1]:
            tensor.CopyFrom(builders.weight(tensor.name, onnx.numpy_helper.to_array(tensor) * 2))
    found = align(model, fused)
    assert found.values[norm.output[0]] == norm.output[0]
    assert found.how[norm.output[0]] == "use"
    assert found.values[conv.output[0]] == norm.output[0]
    assert len(found.nodes) == len(graph.node) - 1


def test_insertions_all_over_leave_what_is_between_aligned() -> None:
    count = 30
    a, b = (builders.chain(1) for _ in range(2))
    for model, extra in ((a, ()), (b, ("Neg", "Exp"))):
        del model.graph.node[:]
        last = "v0"
        for index in range(count):
            for op_type in ("Conv", *extra, "Relu"):
                inputs = [last, f"w{index}"] if op_type == "Conv" else [last]
                last = f"{op_type}{index}"
                model.graph.node.append(helper.make_node(op_type, inputs, [last], name=last))
            model.graph.initializer.append(builders.weight(f"w{index}", [[[1.0 + (model is b)]]]))
        model.graph.output[0].name = last
    found = align(a, renamed(b))
    assert len(found.nodes) == 2 * count
    assert sorted(found.nodes) == list(found.nodes)
    assert list(found.nodes.values()) == [k for k in range(4 * count) if k % 4 in (0, 3)]


def test_duplicate_computation_that_was_merged_goes_to_the_one_left() -> None:
    a = builders.parsed("g (float[2] x) => (float[2] y) { r = Relu(x)  s = Relu(x)  y = Add(r, s) }")
    b = builders.parsed("g (float[2] x) => (float[2] y) { t = Relu(x)  y = Add(t, t) }")
    values = align(a, b).values
    assert values["r"] == values["s"] == "t"


def test_equal_branches_are_told_apart_by_where_they_go() -> None:
    nodes = [helper.make_node("Relu", ["x"], [f"r{i}"], name=f"relu{i}") for i in range(50)]
    nodes += [helper.make_node("Neg", [f"r{i}"], [f"n{i}"]) for i in range(50)]
    nodes.append(helper.make_node("Concat", [f"n{i}" for i in range(50)], ["y"], axis=0))
    a = builders.model(nodes, [builders.value("x")], [builders.value("y", (100,))])
    b = renamed(a)
    found = align(a, b)
    last = b.graph.node[-1]
    assert [found.values[f"n{i}"] for i in range(50)] == list(last.input)


def test_inputs_and_outputs_go_by_name_and_then_by_position() -> None:
    a = builders.parsed("g (float[2] p, float[2] q, float[2] r) => (float[2] y) { t = Sub(p, q)  y = Sub(t, r) }")
    b = builders.parsed("g (float[2] r, float[2] p, float[2] z) => (float[2] w) { t = Sub(p, z)  w = Sub(t, r) }")
    found = align(a, b)
    assert found.values == {"p": "p", "q": "z", "r": "r", "t": "t", "y": "w"}
    assert found.nodes == {0: 0, 1: 1}


def test_models_are_left_alone() -> None:
    a = builders.chain(4)
    nodes = list(a.graph.node)[::-1]
    del a.graph.node[:]
    a.graph.node.extend(nodes)  # out of order: put in order in the copy only
    before = a.SerializeToString()
    found = align(a, builders.chain(4))
    assert a.SerializeToString() == before
    assert [node.name for node in found.a.graph.node] == ["n0", "n1", "n2", "n3"]
    assert found.nodes == {k: k for k in range(4)}


@pytest.mark.parametrize(
    "form", [lambda m: m, lambda m: m.SerializeToString(), lambda m: onnx.load_from_string(m.SerializeToString())]
)
def test_models_come_in_any_form(form: Callable[[onnx.ModelProto], object]) -> None:
    assert len(align(form(builders.mlp()), form(builders.mlp())).nodes) == 3


def test_bad_models_are_refused() -> None:
    with pytest.raises(ModelError, match="cycle"):
        align(builders.parsed("g (float[2] x) => (float[2] y) { y = Add(x, z)  z = Relu(y) }"), builders.relu())
    with pytest.raises(InputError, match="no such file"):
        align("missing.onnx", builders.relu())
    with pytest.raises(InputError, match="both '-'"):
        align("-", "-")
    broken = builders.mlp()
    broken.graph.initializer[0].raw_data = b"123"
    with pytest.raises(ModelError, match="w1"):
        align(broken, builders.mlp())


def test_constants_and_initializers_of_one_content_are_one_value() -> None:
    a = builders.parsed("g (float[2] x) => (float[2] y) { c = Constant <value_floats = [1.0, 2.0]> ()  y = Add(x, c) }")
    add = helper.make_node("Add", ["x", "w"], ["y"])
    b = builders.model([add], [builders.value("x")], [builders.value("y")], [builders.weight("w", [1.0, 2.0])])
    found = align(a, b)
    assert found.values["c"] == "w"
    assert found.how["y"] == "same"
    assert found.nodes == {1: 0}
