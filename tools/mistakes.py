"""Wrong rewrites, as functions that edit one node; ``mutations.py`` says where each is planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import parser

from graphopt.graph import nodes

Edit = Callable[[ir.Model, ir.Node], None]
RIGHT = 6
"""Right rewrites beside each wrong one."""


@dataclass(frozen=True)
class Mutation:
    """A model, the node (by the name of its first output) at which the mistake is made, and the mistake."""

    name: str
    body: str
    at: str
    edit: Edit
    opset: int = 17

    def model(self) -> onnx.ModelProto:
        """The model, nodes named after their first outputs, and :data:`RIGHT` places for right rewrites beside it."""
        proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {self.opset}]> {self.body}')
        for number, node in enumerate(n for g in _graphs(proto.graph) for n in g.node):
            node.name = node.output[0] or f"n{number}"
        value = onnx.helper.make_tensor_value_info("right_in", onnx.TensorProto.FLOAT, ["R", 3])
        proto.graph.input.append(value)
        names = ["right_in", *(f"right{i}" for i in range(RIGHT)), "right_out"]
        for old, new in pairwise(names[:-1]):
            proto.graph.node.append(onnx.helper.make_node("Neg", [old], [f"{new}_neg"], name=f"{new}_neg"))
            proto.graph.node.append(onnx.helper.make_node("Identity", [f"{new}_neg"], [new], name=new))
        proto.graph.node.append(onnx.helper.make_node("Exp", [names[-2]], ["right_out"], name="right_out"))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("right_out", onnx.TensorProto.FLOAT, ["R", 3]))
        onnx.checker.check_model(proto, full_check=True)
        return proto


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return [graph, *(g for one in inner for g in _graphs(one))]


def attribute(name: str, value: Any) -> Edit:
    """Another value for an attribute; None drops it."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        if value is None:
            node.attributes.pop(name)
        else:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)

    return edit


def operator(op_type: str, **attributes: Any) -> Edit:
    """Another operator; its attributes in place of the old ones where some are given."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        node.op_type = op_type
        for name, value in attributes.items():
            attribute(name, value)(model, node)

    return edit


def constant(index: int, change: Callable[[Any], Any]) -> Edit:
    """Another constant for an input."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        old = node.inputs[index]
        assert old is not None
        tensor = ir.convenience.get_const_tensor(old)
        assert tensor is not None
        value = ir.Value(name=f"{old.name}_changed", const_value=ir.tensor(np.asarray(change(tensor.numpy()))))
        model.graph.register_initializer(value)
        node.replace_input_with(index, value)

    return edit


def bypass(index: int = 0) -> Edit:
    """Who reads the node's output reads its input instead."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        source = node.inputs[index]
        assert source is not None
        node.outputs[0].replace_all_uses_with(source)

    return edit


def fill(value: float, kind: type[np.generic] = np.float32) -> Edit:
    """The output is taken to be this constant, in the shape of the first input."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        shape = ir.node("Shape", [node.inputs[0]], name=f"{node.name}_shape")
        value_ = ir.tensor(np.asarray([value], kind))
        made = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": value_}, name=f"{node.name}_fill")
        assert node.graph is not None
        node.graph.insert_before(node, [shape, made])
        node.outputs[0].replace_all_uses_with(made.outputs[0])

    return edit


def inputs(*order: int) -> Edit:
    """The inputs in another order; a negative number leaves one out."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        old = list(node.inputs)
        for index, which in enumerate(order):
            node.replace_input_with(index, old[which] if which >= 0 else None)

    return edit


def same_as(name: str) -> Edit:
    """Who reads the node's output reads another node's, as if both computed the same."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        other = next(n for n in nodes(model) if n.name == name)
        node.outputs[0].replace_all_uses_with(other.outputs[0])

    return edit


def reads(index: int, name: str) -> Edit:
    """Input ``index`` is another value of the model."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        values = {v.name: v for g in model.graphs() for v in (*g.inputs, *(o for n in g for o in n.outputs))}
        node.replace_input_with(index, values[name])

    return edit


def reader_reads(name: str) -> Edit:
    """The node that reads the output reads another value of the model."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        reads(0, name)(model, next(user for user, _ in node.outputs[0].uses()))

    return edit


def swapped_outputs(model: ir.Model, node: ir.Node) -> None:
    """The first two outputs change places."""
    first, second = node.outputs[0], node.outputs[1]
    for (user, index), other in [(u, second) for u in list(first.uses())] + [(u, first) for u in list(second.uses())]:
        user.replace_input_with(index, other)


def no_longer_overridable(model: ir.Model, node: ir.Node) -> None:
    """An initializer that a caller may override is replaced by its present value."""
    value = next(v for v in node.inputs if v is not None and v.is_initializer() and v.is_graph_input())
    twin = ir.Value(name=f"{value.name}_folded", const_value=value.const_value)
    model.graph.register_initializer(twin)
    node.replace_input_with(list(node.inputs).index(value), twin)


def reversed_order(model: ir.Model, node: ir.Node) -> None:
    """The indices counted from the other end: ties come out the other way."""
    topk = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert topk is not None
    graph = model.graph
    axis = ir.Value(name="rev_axis", const_value=ir.tensor(np.asarray([1])))
    bounds = [
        ir.Value(name=f"rev{i}", const_value=ir.tensor(np.asarray([b]))) for i, b in enumerate((-1, -(2**62), -1))
    ]
    seven = ir.Value(name="seven", const_value=ir.tensor(np.asarray(7)))
    for value in (axis, *bounds, seven):
        graph.register_initializer(value)
    flip = ir.node("Slice", [topk.inputs[0], bounds[0], bounds[1], axis, bounds[2]], name="flip")
    back = ir.node("Sub", [seven, topk.outputs[1]], name="back")
    graph.insert_before(topk, flip)
    graph.insert_after(topk, back)
    topk.replace_input_with(0, flip.outputs[0])
    node.replace_input_with(0, back.outputs[0])


def floor_division(model: ir.Model, node: ir.Node) -> None:
    """(x - x mod k) / k, which rounds down, not towards zero."""
    mod = ir.node("Mod", [node.inputs[0], node.inputs[1]], name="mod")
    rest = ir.node("Sub", [node.inputs[0], mod.outputs[0]], name="rest")
    model.graph.insert_before(node, [mod, rest])
    node.replace_input_with(0, rest.outputs[0])


def through(kind: ir.DataType) -> Edit:
    """A narrower type on the way."""

    def edit(model: ir.Model, node: ir.Node) -> None:
        narrow = ir.node("Cast", [node.inputs[0]], {"to": kind.value}, name="narrow")
        model.graph.insert_before(node, narrow)
        node.replace_input_with(0, narrow.outputs[0])

    return edit


def round_half_up(model: ir.Model, node: ir.Node) -> None:
    """Floor(x + 0.5): differs at halves only."""
    half = ir.Value(name="half", const_value=ir.tensor(np.float32(0.5)))
    model.graph.register_initializer(half)
    add = ir.node("Add", [node.inputs[0], half], name="plus_half")
    model.graph.insert_before(node, add)
    node.replace_input_with(0, add.outputs[0])
    node.op_type = "Floor"


def sign_without_zero(model: ir.Model, node: ir.Node) -> None:
    """x / |x|: NaN at zero."""
    size = ir.node("Abs", [node.inputs[0]], name="size")
    model.graph.insert_before(node, size)
    divide = ir.node("Div", [node.inputs[0], size.outputs[0]], name="divide")
    model.graph.insert_before(node, divide)
    node.outputs[0].replace_all_uses_with(divide.outputs[0])
