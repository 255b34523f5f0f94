"""A concrete ONNX graph run in torch's eager mode, node by node: an independent implementation of its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper


class Eager:
    """``model``: float32, shapes fixed, nothing dynamic left (:func:`graphopt.autodiff.specialize`)."""

    def __init__(self, model: onnx.ModelProto, variables: dict[str, Any]) -> None:
        self.nodes = [(n, {a.name: helper.get_attribute_value(a) for a in n.attribute}) for n in model.graph.node]
        stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.numbers = {n: a for n, a in stored.items() if a.dtype != np.float32}
        self.constants = {n: torch.from_numpy(np.array(a)) for n, a in stored.items()}
        self.variables = {n: torch.from_numpy(np.array(a)).requires_grad_() for n, a in variables.items()}

    def step(self, feeds: dict[str, torch.Tensor], loss: str) -> dict[str, Any]:
        """Gradients by variable."""
        for value in self.variables.values():
            value.grad = None
        values = {**self.constants, **self.variables, **feeds}
        for node, attributes in self.nodes:
            inputs = [values[n] if n else None for n in node.input]
            values[node.output[0]] = _run(node, attributes, inputs, self.numbers)
        values[loss].sum().backward()
        return {n: v.grad for n, v in self.variables.items()}


def _run(node: onnx.NodeProto, a: dict[str, Any], x: list[Any], numbers: dict[str, Any]) -> Any:
    kind = node.op_type
    if kind in _PLAIN:
        return _PLAIN[kind](*x)
    return globals()[f"_{kind.lower()}"](node, a, x, numbers)


_PLAIN: dict[str, Any] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow, "Sqrt": torch.sqrt,
    "Erf": torch.erf, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp,
    "Log": torch.log, "MatMul": torch.matmul, "Identity": lambda x: x, "Neg": torch.neg, "Sum": lambda *x: sum(x),
    "Reciprocal": torch.reciprocal, "Max": torch.maximum, "Min": torch.minimum, "Equal": torch.eq,
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True), "Where": torch.where,
    "Expand": lambda x, s: x.expand(torch.broadcast_shapes(x.shape, tuple(s.tolist()))),
    "And": torch.logical_and,
}  # fmt: skip


def _pads(a: dict[str, Any], dims: int, x: Any, kernel: Any, value: float = 0.0) -> tuple[Any, Any]:
    """(x, what torch pads by itself); uneven padding is done beforehand."""
    pads = a.get("pads", [0] * 2 * dims)
    auto = a.get("auto_pad", b"NOTSET").decode()
    if auto.startswith("SAME"):
        strides, dilations = a.get("strides", [1] * dims), a.get("dilations", [1] * dims)
        total = [
            max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
            for size, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    if pads[:dims] == pads[dims:]:
        return x, tuple(pads[:dims])
    order = [p for i in reversed(range(dims)) for p in (pads[i], pads[dims + i])]
    return F.pad(x, order, value=value), (0,) * dims


def _globalmaxpool(_: Any, __: Any, x: list[Any], ___: Any) -> Any:
    return x[0].amax(dim=tuple(range(2, x[0].ndim)), keepdim=True)


def _conv(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    dims = x[1].ndim - 2
    data, pads = _pads(a, dims, x[0], x[1].shape[2:])
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    bias = x[2] if len(x) > 2 else None
    one = [1] * dims
    return call(data, x[1], bias, a.get("strides", one), pads, a.get("dilations", one), a.get("group", 1))


def _convtranspose(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    bias = x[2] if len(x) > 2 else None
    pads = a.get("pads", [0, 0, 0, 0])[:2]
    return F.conv_transpose2d(
        x[0], x[1], bias, a.get("strides", 1), pads, a.get("output_padding", 0), a.get("group", 1)
    )


def _gemm(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    left, right = x[0].T if a.get("transA") else x[0], x[1].T if a.get("transB") else x[1]
    found = a.get("alpha", 1.0) * (left @ right)
    return found + a.get("beta", 1.0) * x[2] if len(x) > 2 else found


def _clip(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    low, high = (float(v) if v is not None else None for v in (*x[1:], None, None)[:2])
    return torch.clamp(x[0], low, high)


def _hardsigmoid(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return torch.clamp(x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1)


def _maxpool(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    data, pads = _pads(a, 2, x[0], a["kernel_shape"], float("-inf"))
    return F.max_pool2d(data, a["kernel_shape"], a.get("strides"), pads, ceil_mode=bool(a.get("ceil_mode", 0)))


def _averagepool(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    data, pads = _pads(a, 2, x[0], a["kernel_shape"])
    return F.avg_pool2d(data, a["kernel_shape"], a.get("strides"), pads, count_include_pad=False)


def _batchnormalization(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], False, 0.0, a.get("epsilon", 1e-5))


def _layernormalization(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    axis = a.get("axis", -1) % x[0].ndim
    return F.layer_norm(x[0], x[0].shape[axis:], x[1], x[2], a.get("epsilon", 1e-5))


def _softmax(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return torch.softmax(x[0], a.get("axis", -1))


def _axes(a: dict[str, Any], x: list[Any]) -> tuple[int, ...]:
    given = x[1].tolist() if len(x) > 1 and x[1] is not None else a.get("axes")
    return tuple(given) if given is not None else tuple(range(x[0].ndim))


def _reducemean(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].mean(_axes(a, x), keepdim=bool(a.get("keepdims", 1)))


def _reducesum(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].sum(_axes(a, x), keepdim=bool(a.get("keepdims", 1)))


def _reducel2(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].square().sum(_axes(a, x), keepdim=bool(a.get("keepdims", 1))).sqrt()


def _concat(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return torch.cat(x, a["axis"])


def _reshape(node: Any, _: Any, x: list[Any], numbers: dict[str, Any]) -> Any:
    shape = [x[0].shape[i] if n == 0 else int(n) for i, n in enumerate(numbers[node.input[1]])]
    return x[0].reshape(shape)


def _flatten(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    axis = a.get("axis", 1)
    return x[0].reshape(int(np.prod(x[0].shape[:axis])), -1)


def _transpose(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].permute(a["perm"])


def _squeeze(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].squeeze(_axes(a, x))


def _unsqueeze(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    for axis in sorted(_axes(a, x)):
        x[0] = x[0].unsqueeze(axis)
    return x[0]


def _slice(node: Any, a: dict[str, Any], x: list[Any], numbers: dict[str, Any]) -> Any:
    given = [numbers[n].tolist() for n in node.input[1:]]
    axes = given[2] if len(given) > 2 else range(len(given[0]))
    steps = given[3] if len(given) > 3 else [1] * len(given[0])
    found = x[0]
    for start, end, axis, step in zip(given[0], given[1], axes, steps, strict=True):
        picked = range(*slice(start, end, step).indices(found.shape[axis]))
        found = found.index_select(axis, torch.tensor(picked))
    return found


def _resize(node: Any, a: dict[str, Any], x: list[Any], numbers: dict[str, Any]) -> Any:
    scale = [float(s) for s in x[2]][2:]
    mode = a.get("mode", b"nearest").decode()
    return F.interpolate(x[0], scale_factor=scale, mode="bilinear" if mode == "linear" else mode)


def _cast(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].to({1: torch.float32, 7: torch.int64, 6: torch.int32, 9: torch.bool}[a["to"]])


def _gather(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    axis = a.get("axis", 0) % x[0].ndim
    found = x[0].index_select(axis, x[1].reshape(-1) % x[0].shape[axis])
    return found.reshape(*x[0].shape[:axis], *x[1].shape, *x[0].shape[axis + 1 :])


def _pad(node: Any, a: dict[str, Any], x: list[Any], numbers: dict[str, Any]) -> Any:
    amounts = numbers[node.input[1]].tolist()
    dims = x[0].ndim
    mode = a.get("mode", b"constant").decode()
    order = [p for i in reversed(range(dims)) for p in (amounts[i], amounts[dims + i])]
    if mode == "constant":
        return F.pad(x[0], order)
    used = max(i for i, p in enumerate(order) if p) // 2 + 1
    return F.pad(x[0], order[: 2 * used], mode=mode)


def _reducemax(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].amax(_axes(a, x), keepdim=bool(a.get("keepdims", 1)))


def _reducemin(_: Any, a: dict[str, Any], x: list[Any], __: Any) -> Any:
    return x[0].amin(_axes(a, x), keepdim=bool(a.get("keepdims", 1)))
