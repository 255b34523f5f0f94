"""Gradient graphs held to finite differences in float64 (onnx.reference), and ONNX Runtime held to that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from graphopt.autodiff import differentiate, specialize
from graphopt.autodiff.specialize import bodies
from graphopt.session import Session

Arrays = Mapping[str, Any]


def node_model(
    node: onnx.NodeProto, arrays: Arrays, *, opset: int = 21, constants: Sequence[str] = ()
) -> onnx.ModelProto:
    """A model of one node: ``arrays`` are its inputs, those in ``constants`` initializers."""
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.asarray(a).dtype), list(np.shape(a)))
        for n, a in arrays.items()
        if n not in constants
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    stored = [numpy_helper.from_array(np.asarray(arrays[n]), n) for n in constants]
    graph = helper.make_graph([node], "g", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def with_loss(model: onnx.ModelProto, feeds: Arrays, seed: int = 0) -> onnx.ModelProto:
    """A copy whose only output is ``loss``: its float outputs, weighted at random, squared and summed."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    rng = np.random.default_rng(seed)
    session = Session(made, optimize=False, threads=1)
    found = session.run(feeds)
    parts = []
    for name, value in found.items():
        if np.asarray(value).dtype != np.float32:
            continue
        weight = rng.uniform(0.5, 1.5, np.shape(value)).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.w"))
        made.graph.initializer.append(numpy_helper.from_array(np.asarray([-1], np.int64), f"{name}.s"))
        made.graph.node.append(helper.make_node("Mul", [name, f"{name}.w"], [f"{name}.p"]))
        made.graph.node.append(helper.make_node("Reshape", [f"{name}.p", f"{name}.s"], [f"{name}.r"]))
        made.graph.node.append(helper.make_node("MatMul", [f"{name}.r", f"{name}.r"], [f"{name}.sq"]))
        made.graph.node.append(helper.make_node("Reshape", [f"{name}.sq", f"{name}.s"], [f"{name}.sq1"]))
        parts.append(f"{name}.sq1")
    made.graph.node.append(helper.make_node("Sum", parts, ["loss"]))
    del made.graph.output[:]
    made.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, [1]))
    return made


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every float32 in it becomes a float64."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _graph_to_double(made.graph)
    return made


def _graph_to_double(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _tensor_to_double(tensor)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("t"):
                _tensor_to_double(item.t)
            if node.op_type == "Cast" and item.name == "to" and item.i == TensorProto.FLOAT:
                item.i = TensorProto.DOUBLE
        if node.op_type == "ConstantOfShape" and not node.attribute:
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))
        for body in bodies(node):
            _graph_to_double(body)


def _tensor_to_double(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


class ConvTranspose(OpRun):
    """onnx.reference's own fails on several channels per group."""

    def _run(self, x: Any, w: Any, b: Any = None, **attributes: Any) -> tuple[Any]:
        dims, group = x.ndim - 2, attributes.get("group") or 1
        strides = attributes.get("strides") or [1] * dims
        dilations = attributes.get("dilations") or [1] * dims
        extra = attributes.get("output_padding") or [0] * dims
        pads = attributes.get("pads") or [0] * 2 * dims
        full = [
            (n - 1) * s + (k - 1) * d + 1 + o
            for n, s, k, d, o in zip(x.shape[2:], strides, w.shape[2:], dilations, extra, strict=True)
        ]
        size = [f - p - q for f, p, q in zip(full, pads[:dims], pads[dims:], strict=True)]
        if attributes.get("output_shape"):
            size = attributes["output_shape"]
            total = [max(0, f - s) for f, s in zip(full, size, strict=True)]
            pads = [t - t // 2 for t in total]
        each = x.shape[1] // group
        y = np.zeros((x.shape[0], w.shape[1] * group, *full), x.dtype)
        for place in np.ndindex(*w.shape[2:]):
            spots = tuple(
                slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, d, n, s in zip(place, dilations, x.shape[2:], strides, strict=True)
            )
            for g in range(group):
                own = slice(g * each, (g + 1) * each)
                part = np.einsum("ni...,io->no...", x[:, own], w[(own, slice(None), *place)])
                y[(slice(None), slice(g * w.shape[1], (g + 1) * w.shape[1]), *spots)] += part
        cut = tuple(slice(p, p + s) for p, s in zip(pads[:dims], size, strict=True))
        y = y[(slice(None), slice(None), *cut)]
        return (y if b is None else y + b.reshape(-1, *[1] * dims),)


class Gelu(OpRun):
    """onnx.reference computes its constants in float32."""

    def _run(self, x: Any, approximate: str = "none") -> tuple[Any]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x * math.sqrt(0.5))),)


class GroupNormalization(OpRun):
    """onnx.reference casts to float32 on the way."""

    def _run(self, x: Any, scale: Any, bias: Any, epsilon: float = 1e-5, num_groups: int = 1, **_: Any) -> tuple[Any]:
        wide = x.reshape(x.shape[0], num_groups, -1)
        normal = (wide - wide.mean(2, keepdims=True)) / np.sqrt(wide.var(2, keepdims=True) + epsilon)
        line = (1, -1, *[1] * (x.ndim - 2))
        scale, bias = (np.repeat(v, x.shape[1] // v.size) for v in (scale, bias))
        return (normal.reshape(x.shape) * scale.reshape(line) + bias.reshape(line),)


class OneHot(OpRun):
    """onnx.reference's own refuses a depth of shape [1]."""

    def _run(self, indices: Any, depth: Any, values: Any, axis: int = -1) -> tuple[Any]:
        hot = np.arange(int(np.reshape(depth, -1)[0])) == indices[..., None]
        return (np.moveaxis(np.where(hot, values[1], values[0]), -1, axis),)


class Softmax(OpRun):
    """Before opset 13 everything from ``axis`` on is one axis; onnx.reference does not know that."""

    def _run(self, x: Any, axis: int = 1) -> tuple[Any]:
        flat = x.reshape(math.prod(x.shape[: axis % x.ndim]), -1)
        grown = np.exp(flat - flat.max(axis=1, keepdims=True))
        return ((grown / grown.sum(axis=1, keepdims=True)).reshape(x.shape),)


class LogSoftmax(Softmax):
    """Likewise."""

    def _run(self, x: Any, axis: int = 1) -> tuple[Any]:
        return (np.log(super()._run(x, axis)[0]),)


OWN_OPERATORS: list[type[OpRun]] = [ConvTranspose, Gelu, GroupNormalization, OneHot]


def check(
    model: onnx.ModelProto,
    feeds: Arrays,
    variables: Sequence[str],
    *,
    step: float = 1e-5,
    tolerance: float = 1e-5,
    runtime: float = 2e-4,
    directions: int = 3,
) -> dict[str, Any]:
    """Assert that the gradients of ``model``'s outputs are right; returns them (float64, by variable)."""
    weighted = with_loss(model, feeds)
    concrete = specialize(weighted, feeds, variables)
    gradients = differentiate(concrete, "loss", variables)
    stored = {t.name: numpy_helper.to_array(t) for t in weighted.graph.initializer}
    given = {**feeds, **{v: stored[v] for v in variables if v in stored}}
    exact = {n: a.astype(np.float64) if np.asarray(a).dtype == np.float32 else a for n, a in given.items()}
    own = OWN_OPERATORS if concrete.opset >= 13 else [*OWN_OPERATORS, Softmax, LogSoftmax]
    forward = ReferenceEvaluator(to_double(concrete.model), new_ops=own)
    backward = ReferenceEvaluator(to_double(gradients.model), new_ops=own)
    names = {i.name for i in concrete.model.graph.input}
    exact = {n: a for n, a in exact.items() if n in names}
    found = dict(zip(gradients.of, backward.run(list(gradients.of.values()), exact), strict=True))
    rng = np.random.default_rng(1)
    for variable in variables:
        assert variable in found, f"no gradient of {variable}"
        assert found[variable].shape == exact[variable].shape, variable
        for _ in range(directions):
            way = rng.standard_normal(exact[variable].shape)
            ends = []
            for sign in (1, -1):
                moved = {**exact, variable: exact[variable] + sign * step * way}
                ends.append(float(np.asarray(forward.run(["loss"], moved)[0]).sum()))
            measured = (ends[0] - ends[1]) / (2 * step)
            told = float(np.sum(found[variable] * way))
            scale = max(1e-3, float(np.linalg.norm(found[variable])) * 0.3, abs(measured))
            assert abs(measured - told) <= tolerance * scale, f"{variable}: {told} told, {measured} measured"
    single = Session(gradients.model, threads=1).run({n: given[n] for n in names}, list(gradients.of.values()))
    for variable, name in gradients.of.items():
        size = max(float(np.abs(found[variable]).max()), 1e-3)
        worst = float(np.abs(single[name] - found[variable]).max()) if found[variable].size else 0.0
        assert worst <= runtime * size + 1e-6, f"{variable}: runtime differs by {worst} of {size}"
    return found
