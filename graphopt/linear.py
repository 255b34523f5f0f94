"""Layers as matrices: how Conv, ConvTranspose, MatMul and Gemm turn what they read into inputs x of ``y = W x + b``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.graph import attribute, constant_array, is_op

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Form:
    """How a layer reads ``value``: in ``groups`` groups of inputs x, each ``width`` (K) long.

    ``kind``: ``gemm`` (MatMul, Gemm: x lies along the last axis), ``gemm-t`` (Gemm with transA: the first), ``conv`` or
    ``transpose`` (x by im2col, input channel slowest). ``batch``: a MatMul weight's dims before the last two.
    Layers that read one value alike share one form.
    """

    value: str
    kind: str
    width: int
    groups: int = 1
    batch: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()  # begins, then ends
    auto_pad: str = "NOTSET"
    output: tuple[int, ...] = ()  # ConvTranspose: output_padding
    output_shape: tuple[int, ...] = ()

    @property
    def gram_bytes(self) -> int:
        """Of one float64[groups, K, K]."""
        return 8 * self.groups * self.width**2

    def columns(self, array: NDArray[Any], samples: int, most: int) -> NDArray[np.float32]:
        """X, float32[groups, K, n], out of one array of floats that stacks ``samples`` samples: at most ``most``
        inputs x of each, chosen by position alone. A copy."""
        if self.kind in ("conv", "transpose"):
            found = self._patches(array, most)
        else:
            found = self._vectors(array.T if self.kind == "gemm-t" else array, samples, most)
        return found.astype(np.float32, copy=False)

    def _vectors(self, array: NDArray[Any], samples: int, most: int) -> NDArray[Any]:
        if self.batch:
            lead = np.broadcast_shapes(array.shape[:-2], self.batch)
            array = np.broadcast_to(array, (*lead, *array.shape[-2:]))
            extra = len(lead) - len(self.batch)
            array = np.moveaxis(array, range(extra), range(-2 - extra, -2))  # batch first, then what is stacked
            stacked = array.reshape(self.groups, -1, self.width)
            return stacked[:, _spread(stacked.shape[1], most * samples)].transpose(0, 2, 1)
        array = array.reshape(-1, self.width)
        if len(array) % samples:
            samples = 1
        split = array.reshape(samples, -1, self.width)
        return split[:, _spread(split.shape[1], most)].reshape(1, -1, self.width).transpose(0, 2, 1)

    def _patches(self, array: NDArray[Any], most: int) -> NDArray[Any]:
        count, channels = array.shape[:2]
        index, valid = _gather(self, array.shape[2:], most)
        picked = array.reshape(count, channels, -1)[:, :, index]  # [N, C, kernel * positions], in that order
        if valid is not None:
            picked *= valid  # a copy: advanced indexing made it
        picked = picked.reshape(count, self.groups, self.width, -1)
        return picked[0] if count == 1 else picked.transpose(1, 2, 0, 3).reshape(self.groups, self.width, -1)

    def _taps(self, axis: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """(index into the input, whether it is inside), each [outputs, kernel], of one spatial axis."""
        kernel, stride, dilation = self.kernel[axis], self.strides[axis], self.dilations[axis]
        begin, end = self.pads[axis], self.pads[axis + len(self.kernel)]
        span = dilation * (kernel - 1) + 1
        if self.kind == "conv":
            if self.auto_pad.startswith("SAME"):
                begin, end = _halves(max((-(-size // stride) - 1) * stride + span - size, 0), self.auto_pad)
            count = (size + begin + end - span) // stride + 1
            index = np.arange(count)[:, None] * stride - begin + np.arange(kernel) * dilation
            inside = (index >= 0) & (index < size)
        else:
            full = stride * (size - 1) + self.output[axis] + span
            if self.output_shape or self.auto_pad.startswith("SAME"):
                wanted = self.output_shape[axis] if self.output_shape else size * stride
                begin, end = _halves(full - wanted, self.auto_pad)
            index = np.arange(full - begin - end)[:, None] + begin - np.arange(kernel) * dilation
            inside = (index % stride == 0) & (index >= 0) & (index // stride < size)
            index = index // stride
        return np.clip(index, 0, size - 1), inside


def _halves(total: int, auto_pad: str) -> tuple[int, int]:
    small = total // 2
    return (small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small)


@lru_cache(256)
def _gather(form: Form, spatial: tuple[int, ...], most: int) -> tuple[NDArray[np.intp], NDArray[np.bool_] | None]:
    """Where in one flattened channel the patches lie, and what of them is no padding (None: all): [kernel * positions],
    the position fastest."""
    tables = [form._taps(axis, size) for axis, size in enumerate(spatial)]
    sizes = [len(index) for index, _ in tables]
    chosen = np.unravel_index(_spread(math.prod(sizes), most), sizes)
    flat: NDArray[Any] = np.zeros((1,) * len(spatial) + (1,), np.intp)
    valid: NDArray[Any] = np.ones_like(flat, np.bool_)
    for axis, ((index, inside), position) in enumerate(zip(tables, chosen, strict=True)):
        shape = [*(1 if a != axis else index.shape[1] for a in range(len(spatial))), len(position)]
        flat = flat * spatial[axis] + index[position].T.reshape(shape)
        valid = valid & inside[position].T.reshape(shape)
    return flat.reshape(-1), None if valid.all() else np.broadcast_to(valid, flat.shape).reshape(-1)


@lru_cache(256)
def _spread(count: int, most: int) -> NDArray[np.intp]:
    """At most ``most`` of ``count`` positions, spread evenly (a step of the golden section, which meets no grid)."""
    if count <= most:
        return np.arange(count)
    step = max(round(count * _GOLDEN), 1)
    while math.gcd(step, count) > 1:
        step += 1
    return np.sort(np.arange(most) * step % count)


def form_of(node: ir.Node) -> Form | None:
    """How ``node`` reads its data; None for an operator or a form of it that is no matrix product by constants."""
    if not is_op(node, "Conv", "ConvTranspose", "MatMul", "Gemm"):
        return None
    data, weight = node.inputs[0], constant_array(node.inputs[1])
    if data is None or not data.name or weight is None or weight.dtype.kind != "f" or weight.size == 0:
        return None
    if node.op_type == "MatMul":
        if weight.ndim < 2:
            return None
        batch = weight.shape[:-2]
        while batch and batch[0] == 1:
            batch = batch[1:]
        if 1 in batch:  # which rows meet which weights then depends on the data's shape
            return None
        return Form(data.name, "gemm", weight.shape[-2], math.prod(batch), batch)
    if node.op_type == "Gemm":
        kind = "gemm-t" if attribute(node, "transA", 0) else "gemm"
        return Form(data.name, kind, weight.shape[1 if attribute(node, "transB", 0) else 0])
    return _conv_form(node, data.name, weight)


def _conv_form(node: ir.Node, value: str, weight: NDArray[Any]) -> Form:
    kernel = weight.shape[2:]
    ones, groups = (1,) * len(kernel), int(attribute(node, "group", 1))
    plain = node.op_type == "Conv"
    inputs = weight.shape[1] if plain else weight.shape[0] // groups
    return Form(
        value,
        "conv" if plain else "transpose",
        inputs * math.prod(kernel),
        groups,
        kernel=kernel,
        strides=tuple(attribute(node, "strides", ones)),
        dilations=tuple(attribute(node, "dilations", ones)),
        pads=tuple(attribute(node, "pads", (0,) * (2 * len(kernel)))),
        auto_pad=str(attribute(node, "auto_pad", "NOTSET")),
        output=() if plain else tuple(attribute(node, "output_padding", (0,) * len(kernel))),
        output_shape=() if plain else tuple(attribute(node, "output_shape", ()))[-len(kernel) :],
    )


def to_matrix(node: ir.Node, weight: NDArray[Any]) -> NDArray[np.float64]:
    """The layer's weights as W of ``y = W x + b``: float64[groups, outputs of a group, K] (Gemm's alpha included)."""
    values = weight.astype(np.float64)
    groups = int(attribute(node, "group", 1))
    if node.op_type == "Conv":
        return values.reshape(groups, weight.shape[0] // groups, -1)
    if node.op_type == "ConvTranspose":
        split = values.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return split.transpose(0, 2, 1, 3).reshape(groups, weight.shape[1], -1)
    if node.op_type == "Gemm":
        oriented = values if attribute(node, "transB", 0) else values.T
        return (oriented * float(attribute(node, "alpha", 1.0)))[None]
    return np.swapaxes(values.reshape(-1, *weight.shape[-2:]), 1, 2)


def from_matrix(node: ir.Node, matrix: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of :func:`to_matrix`: an array of ``shape``, laid out as the node's weight."""
    if node.op_type == "Conv":
        return matrix.reshape(shape)
    if node.op_type == "ConvTranspose":
        groups = len(matrix)
        split = matrix.reshape(groups, shape[1], shape[0] // groups, -1)
        return split.transpose(0, 2, 1, 3).reshape(shape)
    if node.op_type == "Gemm":
        plain: NDArray[Any] = matrix[0] / float(attribute(node, "alpha", 1.0))
        return plain if attribute(node, "transB", 0) else plain.T
    return np.swapaxes(matrix, 1, 2).reshape(shape)
