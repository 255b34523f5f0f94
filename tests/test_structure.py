"""Well-formed or refused, in linear time."""

from __future__ import annotations

import random
import time

import builders
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from graphopt.errors import InternalError, ModelError
from graphopt.model import clone, load, to_bytes, to_proto
from graphopt.structure import MAX_NESTING, check_model, check_proto


def node(inputs: str, outputs: str, op: str = "Relu", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"make_{outputs}", **attributes)


def made(*nodes: onnx.NodeProto, output: str = "y", **more: object) -> onnx.ModelProto:
    return builders.model(nodes, [builders.value("x")], [builders.value(output)], **more)  # type: ignore[arg-type]


def with_body(*nodes: onnx.NodeProto, output: str = "o", outer: str = "x") -> onnx.ModelProto:
    body = builders.branch("b", nodes, output)
    other = builders.branch("e", [helper.make_node("Identity", [outer], ["e"])], "e")
    proto = made(helper.make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=other))
    proto.graph.input.append(builders.value("c", (), TensorProto.BOOL))
    return proto


def without_opset() -> onnx.ModelProto:
    proto = builders.relu()
    del proto.opset_import[:]
    return proto


def with_opset_twice() -> onnx.ModelProto:
    proto = builders.relu()
    proto.opset_import.add(domain="", version=1)
    return proto


def recursive() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    functions = [
        helper.make_function("f", a, ["p"], ["q"], [helper.make_node(b, ["p"], ["q"], domain="f")], opsets)
        for a, b in (("A", "B"), ("B", "A"))
    ]
    return made(helper.make_node("A", ["x"], ["y"], domain="f"), domains=["f"], functions=functions)


def bad_function(*nodes: onnx.NodeProto, twice: bool = False) -> onnx.ModelProto:
    proto = builders.function_model()
    if nodes:
        del proto.functions[0].node[:]
        proto.functions[0].node.extend(nodes)
    if twice:
        proto.functions.append(proto.functions[0])
    return proto


BAD = {
    "undefined input": (made(node("nope", "y")), r"node 'make_y' \(Relu\) reads 'nope', which nothing makes"),
    "undefined output": (made(node("x", "a")), "output 'y' is made by nothing"),
    "made twice": (made(node("x", "y"), node("x", "y", "Neg")), r"node 'make_y' \(Neg\) makes 'y' a second time"),
    "twice by one node": (made(node("x", "y y", "Split")), "makes 'y' a second time"),
    "makes an input": (made(node("x", "x"), node("x", "y")), "makes 'x' a second time"),
    "makes an initializer": (
        made(node("x", "w"), node("w", "y"), initializers=[builders.weight("w", [1, 2])]),
        "makes 'w' a second time",
    ),
    "initializer twice": (made(node("x", "y"), initializers=[builders.weight("w", [1])] * 2), "'w' is defined twice"),
    "no operator": (made(helper.make_node("", ["x"], ["y"])), "node 0 has no operator type"),
    "cycle": (made(node("b", "a"), node("a", "b"), node("b", "y")), r"depends on its own output \(a cycle\)"),
    "cycle of one": (made(node("x y", "y", "Add")), r"node 'make_y' \(Add\) depends on its own output"),
    "no opset": (without_opset(), "declares no opset"),
    "opset twice": (with_opset_twice(), "imported twice"),
    "undefined in a body": (
        with_body(node("nope", "o")),
        r"reads 'nope', which nothing makes \(in a body of node 'if'",
    ),
    "body reads the node's own output": (with_body(node("y", "o")), "depends on its own output"),
    "body's output is an outer value": (with_body(output="x"), "'x' of a body is a value of the graph around it"),
    "another body's value": (with_body(node("e", "o")), "reads 'e', which nothing makes"),
    "too deep": (builders.nested(MAX_NESTING + 1), "nested more than 30 deep"),
    "recursive functions": (recursive(), "function 'f::A' calls itself"),
    "function twice": (bad_function(twice=True), "'mine::AddK' is defined twice"),
    "function reads nothing": (bad_function(node("nope", "b")), r"reads 'nope', which nothing makes \(in function"),
    "function makes no output": (bad_function(node("a", "c")), "output 'b' is made by nothing"),
    "function sees no outer value": (bad_function(node("x", "b")), "reads 'x', which nothing makes"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    proto, said = BAD[name]
    with pytest.raises(ModelError, match=said) as caught:
        load(proto)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith("export it again")


def test_input_twice() -> None:
    proto = builders.relu()
    proto.graph.input.append(proto.graph.input[0])
    with pytest.raises(ModelError, match="input 'x' is listed twice"):
        load(proto)


class TestOrder:
    """ONNX Runtime runs models whose nodes are out of order, so we take them; what we write is in order."""

    def test_sorted_and_equal(self) -> None:
        proto = builders.chain(50)
        nodes = list(proto.graph.node)
        random.Random(0).shuffle(nodes)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        with pytest.raises(onnx.checker.ValidationError):
            onnx.checker.check_model(proto)
        result = to_proto(load(proto))
        onnx.checker.check_model(result)
        feed = {"v0": np.array([-1, 2], np.float32)}
        runs = [onnxruntime.InferenceSession(p.SerializeToString()).run(None, feed)[0] for p in (proto, result)]
        assert np.array_equal(*runs)

    def test_an_order_that_works_is_kept(self) -> None:
        proto = made(node("x", "b"), node("x", "a", "Neg"), node("a b", "y", "Add"))
        assert [n.output[0] for n in to_proto(load(proto)).graph.node] == ["b", "a", "y"]

    def test_only_what_must_move_moves(self) -> None:
        proto = made(node("a b", "y", "Add"), node("x", "b"), node("x", "a", "Neg"), node("x", "c", "Abs"))
        assert [n.output[0] for n in to_proto(load(proto)).graph.node] == ["b", "a", "y", "c"]

    def test_bodies_count_as_readers(self) -> None:
        proto = with_body(node("late", "o"))
        proto.graph.node.append(node("x", "late"))
        assert [n.output[0] for n in to_proto(load(proto)).graph.node] == ["late", "y"]

    def test_bodies_and_functions_are_sorted_too(self) -> None:
        proto = with_body(node("m", "o"), node("x", "m", "Neg"))
        onnx.checker.check_model(to_proto(load(proto)))
        proto = bad_function(node("k", "b"), node("a", "k", "Neg"))
        onnx.checker.check_model(to_proto(load(proto)))

    def test_a_body_may_use_a_later_name_for_its_own(self) -> None:
        proto = with_body(node("x", "late"), node("late", "o"))
        proto.graph.node.append(node("x", "late"))
        assert [n.output[0] for n in to_proto(load(proto)).graph.node] == ["y", "late"]

    def test_the_caller_keeps_his_order(self) -> None:
        proto = made(node("a", "y"), node("x", "a"))
        load(proto)
        assert proto.graph.node[0].output[0] == "y"


def test_deepest_nesting_survives_everything() -> None:
    model = load(builders.nested(MAX_NESTING))
    check_model(clone(model), "pass")
    assert to_bytes(load(to_bytes(model))) == to_bytes(model)


class TestCost:
    """A second is many times what these take; a quadratic step takes minutes."""

    def test_long_chain(self) -> None:
        proto = builders.chain(20_000)
        self.quick(lambda: check_proto(proto, "m"), 2)
        model = load(proto)
        self.quick(lambda: check_model(model, "pass"), 1)

    def test_many_bodies_under_many_values(self) -> None:
        proto = builders.conditional(3_000)
        self.quick(lambda: check_proto(proto, "m"), 2)
        model = load(proto)
        self.quick(lambda: check_model(model, "pass"), 1)

    def test_many_inputs_and_initializers(self) -> None:
        count = 20_000
        proto = made(node("x", "y"), initializers=[builders.weight(f"w{i}", [i]) for i in range(count)])
        proto.graph.input.extend(builders.value(f"w{i}", (1,)) for i in range(count))
        self.quick(lambda: check_proto(proto, "m"), 2)
        model = load(proto)
        self.quick(lambda: check_model(model, "pass"), 1)

    def test_long_cycle(self) -> None:
        proto = builders.chain(20_000)
        proto.graph.node[0].input[0] = "v20000"

        def check() -> None:
            with pytest.raises(ModelError, match="cycle"):
                check_proto(proto, "m")

        self.quick(check, 3)

    @staticmethod
    def quick(function: object, seconds: float) -> None:
        start = time.process_time()
        function()  # type: ignore[operator]
        assert time.process_time() - start < seconds


class TestAfterAPass:
    def check(self, model: ir.Model, said: str) -> None:
        with pytest.raises(InternalError, match=rf"pass 'bad' left a broken graph: .*{said}"):
            check_model(model, "bad")

    def test_sound(self) -> None:
        for proto in (builders.mlp(), builders.conditional(3), builders.function_model()):
            check_model(load(proto), "pass")

    def test_dangling_input(self) -> None:
        model = load(builders.mlp())
        model.graph[1].replace_input_with(0, ir.Value(name="ghost"))
        self.check(model, "reads 'ghost' before it is made")

    def test_out_of_order(self) -> None:
        model = load(builders.mlp())
        first = model.graph[0]
        model.graph.remove(first)
        model.graph.append(first)
        self.check(model, "reads 'h' before it is made")

    def test_same_name_twice(self) -> None:
        model = load(builders.mlp())
        model.graph[1].outputs[0].name = "h"
        self.check(model, "two values are named 'h'")

    def test_name_of_an_input(self) -> None:
        model = load(builders.mlp())
        model.graph[1].outputs[0].name = "x"
        self.check(model, "two values are named 'x'")

    def test_initializer_without_data(self) -> None:
        model = load(builders.mlp())
        model.graph.initializers["w1"].const_value = None
        self.check(model, "'w1' has no data")

    def test_output_nobody_makes(self) -> None:
        model = load(builders.mlp())
        model.graph.outputs[0] = ir.Value(name="ghost")
        self.check(model, "'ghost' is made by nothing")

    def test_in_a_body(self) -> None:
        model = load(builders.conditional())
        body = model.graph[0].attributes["then_branch"].as_graph()
        body[0].replace_input_with(0, ir.Value(name="ghost"))
        self.check(model, "ghost.* in a body of 'if0'".replace(" in", r" \(in"))

    def test_in_a_function(self) -> None:
        model = load(builders.function_model())
        function = next(iter(model.functions.values()))
        function.graph[1].replace_input_with(0, ir.Value(name="ghost"))
        self.check(model, "reads 'ghost'")
