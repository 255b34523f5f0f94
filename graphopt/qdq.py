"""Read-only questions about a graph that carries QuantizeLinear and DequantizeLinear nodes, whoever put them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant_array, data_type, is_op

if TYPE_CHECKING:
    from numpy.typing import NDArray

DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""QuantizeLinear and DequantizeLinear are the same operators in ONNX Runtime's own domain."""

PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Parameters:
    """How a Q or DQ node maps: ``real = (integer - zero) * scale``. ``kind``: the integers' type, as ONNX names it in
    lower case; ``axis``: of the scales where there are several; ``block``: elements per scale along it (0: all)."""

    scale: NDArray[Any]
    zero: NDArray[np.int64]
    kind: str
    axis: int
    block: int

    @property
    def per_axis(self) -> bool:
        """Whether there is a scale per place of an axis, or per block."""
        return self.scale.size > 1 or (self.scale.ndim > 0 and self.scale.shape != (1,))

    def same(self, other: Parameters) -> bool:
        """Whether the integers mean the same numbers."""
        return (
            self.kind == other.kind
            and self.scale.shape == other.scale.shape
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
        )


def is_q(node: ir.Node | None) -> bool:
    """Whether it is a QuantizeLinear."""
    return node is not None and node.op_type == "QuantizeLinear" and node.domain in DOMAINS


def is_dq(node: ir.Node | None) -> bool:
    """Whether it is a DequantizeLinear."""
    return node is not None and node.op_type == "DequantizeLinear" and node.domain in DOMAINS


def parameters(node: ir.Node) -> Parameters | None:
    """Of a Q or DQ node; None where scale or zero point are computed, or it has none of its inputs."""
    if len(node.inputs) < 2:
        return None
    scale = constant_array(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant_array(given)
    if scale is None or (given is not None and zero is None):
        return None
    kind = str(zero.dtype) if zero is not None else _kind_without_zero(node)
    integers = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
    return Parameters(scale, integers, kind, int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0)))


def _kind_without_zero(node: ir.Node) -> str:
    """ONNX: uint8 for Q unless ``output_dtype`` says otherwise, for DQ the type of its input."""
    if is_q(node):
        stated = attribute(node, "output_dtype", 0)
        known = data_type(stated)
        return "uint8" if not stated or known is None else known.name.lower()
    value = node.inputs[0]
    stored = constant_array(value)
    if stored is not None:
        return str(stored.dtype)
    if value is not None and isinstance(value.type, ir.TensorType):
        return value.type.dtype.name.lower()
    producer = value.producer() if value is not None else None
    if producer is not None and is_q(producer):
        found = parameters(producer)
        return found.kind if found is not None else "uint8"
    return "uint8"


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DQ node that makes this value, if one does."""
    producer = value.producer() if value is not None else None
    return producer if is_dq(producer) else None


def quantizers(value: ir.Value) -> list[ir.Node]:
    """The Q nodes that read this value."""
    return [use.node for use in value.uses() if is_q(use.node) and use.idx == 0]


def integers_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The stored integers behind a weight that a DQ node (and perhaps a Transpose or Reshape) makes; None: computed."""
    node = dequantizer(value)
    return constant_array(node.inputs[0]) if node is not None else None


def is_stored(value: ir.Value | None) -> bool:
    """Whether the value follows from constants alone through Q and DQ: a weight, not an activation."""
    for _ in range(4):  # float weight -> Q -> DQ is the longest chain there is
        if value is None:
            return False
        if constant_array(value) is not None:
            return True
        producer = value.producer()
        if producer is None or not (is_q(producer) or is_dq(producer) or is_op(producer, "Identity")):
            return False
        value = producer.inputs[0]
    return False
