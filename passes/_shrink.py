"""Taking units out of a graph: constants get smaller, and attributes and targets that say sizes follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.channels.reshaping import retargeted
from graphopt.graph import attribute, constant, constant_array, fresh, is_op, value_names
from graphopt.passes._weights import add_constant, drop_unread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.channels import Channels


class Shrinker:
    """Takes the units out of ``model`` that ``keep`` (one flag per unit of ``channels``) does not hold."""

    def __init__(self, model: ir.Model, channels: Channels, keep: NDArray[np.bool_]) -> None:
        self.model, self.channels, self.keep = model, channels, keep
        self.taken = value_names(model)

    def run(self) -> None:
        """Edit the model in place."""
        for node in list(self.model.graph):
            fix = _FIXES.get(node.op_type) if is_op(node, *_FIXES) else None
            if fix is not None and node.outputs[0] in self.channels.trace.axes:
                fix(self, node)
        for value in list(self.channels.constants):
            if is_op(value.producer(), "ConstantOfShape", "Expand"):
                self._cut(value)
        for value, axes in list(self.channels.constants.items()):
            self._shrink(value, [self.kept(vector) for vector in axes])
        for value, axes in self.channels.trace.axes.items():
            if value.shape is not None and len(value.shape) == len(axes):
                sizes = [self.size(v) if v.size != self.size(v) else d for v, d in zip(axes, value.shape, strict=True)]
                value.shape = ir.Shape(sizes)

    def kept(self, vector: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which indices of an axis are left."""
        return self.channels.kept(vector, self.keep)

    def size(self, vector: NDArray[np.int64]) -> int:
        """How many indices of an axis are left."""
        return int(self.kept(vector).sum())

    def axes(self, value: ir.Value | None) -> tuple[NDArray[np.int64], ...]:
        """The atoms of a value."""
        assert value is not None
        return self.channels.trace.of(value)

    def integers(self, node: ir.Node, index: int, numbers: list[int]) -> None:
        """Let input ``index`` of ``node`` be these."""
        old = node.inputs[index] if index < len(node.inputs) else None
        base = f"{node.outputs[0].name}_{node.op_type.lower()}_pruned"
        before = constant_array(old)
        array = np.asarray(numbers, np.int64 if before is None else before.dtype)
        new = add_constant(self.model, self.model.graph, base, array, self.taken, node)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)
        drop_unread(old)

    def _shrink(self, value: ir.Value, kept: list[NDArray[np.bool_]]) -> None:
        if all(mask.all() for mask in kept):
            return
        if constant(value) is None:
            return  # filled at run time: cut behind that (see ``_cut``)
        array = constant_array(value)
        assert array is not None
        for axis, mask in enumerate(kept):
            if not mask.all():
                array = array.compress(mask, axis)
        put(value, np.ascontiguousarray(array))

    def _cut(self, value: ir.Value) -> None:
        """Behind a node that repeats one element: what is too much of it."""
        node, fresh_axes = value.producer(), self.channels.constants[value]
        assert node is not None
        wanted = {i: self.size(v) for i, v in enumerate(fresh_axes) if len(v) and self.size(v) < len(v)}
        if not wanted:
            return
        graph = self.model.graph
        starts, ends, axes = (
            add_constant(self.model, graph, f"{value.name}_{part}", np.asarray(n, np.int64), self.taken, node)
            for part, n in (("starts", [0] * len(wanted)), ("ends", list(wanted.values())), ("axes", list(wanted)))
        )
        users = list(value.uses())
        slice_node = ir.node("Slice", [value, starts, ends, axes])
        slice_node.name = fresh(f"{value.name}_shorter", self.taken)
        slice_node.outputs[0].name = slice_node.name
        slice_node.outputs[0].type = value.type
        graph.insert_after(node, [slice_node])
        for user, index in users:
            user.replace_input_with(index, slice_node.outputs[0])


def put(value: ir.Value, array: NDArray[Any]) -> None:
    """Let a constant be ``array``."""
    tensor = ir.tensor(array, dtype=value.dtype, name=value.name)
    producer = value.producer()
    if producer is not None:
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
        for name in ("value_float", "value_floats", "value_int", "value_ints"):
            producer.attributes.pop(name, None)
    else:
        value.const_value = tensor
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)


def _reshape(shrinker: Shrinker, node: ir.Node) -> None:
    made, target = shrinker.axes(node.outputs[0]), node.inputs[1]
    if all(shrinker.size(v) == len(v) for v in made):
        return
    trace = shrinker.channels.trace
    array = constant_array(target)
    if array is None:
        numbers = retargeted(node, made, trace.copied.get(node, set()), trace.same)
        if numbers is None:
            return  # told by Shape, which tells the new size
        node.attributes.pop("allowzero", None)
    else:
        numbers = [int(n) for n in array.reshape(-1)]
    before = shrinker.axes(node.inputs[0])
    for axis, vector in enumerate(made):
        size = shrinker.size(vector)
        if size == len(vector) or numbers[axis] == -1:
            continue
        if numbers[axis] == 0 and axis < len(before) and shrinker.size(before[axis]) == size:
            continue
        numbers[axis] = size
    shrinker.integers(node, 1, numbers)


def _split(shrinker: Shrinker, node: ir.Node) -> None:
    axes = shrinker.axes(node.inputs[0])
    axis = int(attribute(node, "axis", 0)) % len(axes)
    if shrinker.size(axes[axis]) == len(axes[axis]):
        return
    sizes = [shrinker.size(shrinker.axes(output)[axis]) for output in node.outputs]
    node.attributes.pop("num_outputs", None)
    if shrinker.channels.trace.opset >= 13:
        shrinker.integers(node, 1, sizes)
    else:
        node.attributes["split"] = ir.AttrInt64s("split", sizes)


def _slice(shrinker: Shrinker, node: ir.Node) -> None:
    """Starts and ends of what is cut, counted in what is left."""
    axes = shrinker.axes(node.inputs[0])
    trace = shrinker.channels.trace
    attributes = len(node.inputs) < 2
    get = (lambda i, n: list(attribute(node, n, ()))) if attributes else (lambda i, n: trace.ints(node.inputs[i]))
    starts, ends = get(1, "starts"), get(2, "ends")
    told = get(3, "axes") if attributes or (len(node.inputs) > 3 and node.inputs[3] is not None) else None
    if starts is None or ends is None:
        return
    changed = False
    for position, axis in enumerate(told or range(len(starts))):
        vector = axes[axis % len(axes)]
        mask = shrinker.kept(vector)
        if mask.all():
            continue
        places = np.arange(len(vector))[starts[position] : ends[position]]
        first = int(mask[: places[0]].sum()) if len(places) else 0
        starts[position], ends[position] = first, first + int(mask[places].sum())
        changed = True
    if changed and attributes:
        node.attributes["starts"] = ir.AttrInt64s("starts", starts)
        node.attributes["ends"] = ir.AttrInt64s("ends", ends)
    elif changed:
        shrinker.integers(node, 1, starts)
        shrinker.integers(node, 2, ends)


def _gather(shrinker: Shrinker, node: ir.Node) -> None:
    axes = shrinker.axes(node.inputs[0])
    vector = axes[int(attribute(node, "axis", 0)) % len(axes)]
    mask = shrinker.kept(vector)
    indices = constant_array(node.inputs[1])
    if mask.all() or indices is None:
        return
    place = np.cumsum(mask) - 1
    chosen = [int(i) % len(vector) for i in indices.reshape(-1)]
    shrinker.integers(node, 1, [int(place[i]) for i in chosen if mask[i]])


def _conv(shrinker: Shrinker, node: ir.Node) -> None:
    """Of a depthwise convolution, groups have gone."""
    group = int(attribute(node, "group", 1))
    if group == 1:
        return
    channels = shrinker.axes(node.inputs[0])[1]
    if len(channels) == group:  # one channel each: others keep the number of groups
        node.attributes["group"] = ir.AttrInt64("group", shrinker.size(channels))


def _recurrent(shrinker: Shrinker, node: ir.Node) -> None:
    hidden = shrinker.axes(node.inputs[2])[2]
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", shrinker.size(hidden))


def _expand(shrinker: Shrinker, node: ir.Node) -> None:
    """An axis that passes may be any length where the target says 1."""
    made, before = shrinker.axes(node.outputs[0]), shrinker.axes(node.inputs[0])
    target = constant_array(node.inputs[1])
    if target is None:
        return
    numbers = [int(n) for n in target.reshape(-1)]
    changed = False
    for axis in range(1, min(len(before), len(numbers)) + 1):
        if shrinker.size(before[-axis]) < len(before[-axis]) and len(before[-axis]) == len(made[-axis]):
            numbers[-axis], changed = 1, True
    if changed:
        shrinker.integers(node, 1, numbers)


def _resize(shrinker: Shrinker, node: ir.Node) -> None:
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    array = constant_array(sizes)
    made = shrinker.axes(node.outputs[0])
    if array is None or all(shrinker.size(v) == len(v) for v in made):
        return
    numbers = [int(n) for n in array.reshape(-1)]
    for position, axis in enumerate(attribute(node, "axes", None) or range(len(made))):
        if shrinker.size(made[axis]) < len(made[axis]):
            numbers[position] = shrinker.size(made[axis])
    shrinker.integers(node, 3, numbers)


_FIXES: dict[str, Callable[[Shrinker, ir.Node], None]] = {
    "Reshape": _reshape,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Expand": _expand,
    "Resize": _resize,
    "Upsample": _resize,
}
