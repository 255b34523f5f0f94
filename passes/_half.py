"""Which operators can compute in float16, and where its range ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.graph import STANDARD_DOMAINS, bodies
from graphopt.passes._facts import Facts

LARGEST = 65504.0
SMALLEST = 2.0**-14
"""The least normal float16: below, digits are lost one by one, and 6e-8 is zero."""

SUMS = frozenset(
    {
        *("CumSum", "Det", "GRU", "LSTM", "RNN", "Pow", "LpPool", "GlobalLpPool", "LogSoftmax"),
        *("GroupNormalization", "InstanceNormalization", "LayerNormalization", "LRN", "LpNormalization"),
        *("MeanVarianceNormalization", "RMSNormalization", "ReduceL1", "ReduceL2", "ReduceLogSum"),
        *("ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    }
)
"""What adds or multiplies many values up inside, where no range can be seen: those stay in float32."""

_EITHER = frozenset({"Shape", "Size"})
"""What looks at no element: read in whatever type the value has."""

_FLOAT, _HALF = "tensor(float)", "tensor(float16)"


@dataclass(frozen=True)
class Narrowable:
    """A node with the positions of its inputs and outputs that would be float16."""

    node: ir.Node
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def read(self) -> list[ir.Value]:
        """Values it would read as float16."""
        return [value for i in self.inputs if (value := self.node.inputs[i]) is not None]

    def made(self) -> list[ir.Value]:
        """Values it would make as float16."""
        return [self.node.outputs[i] for i in self.outputs]


def narrowable(node: ir.Node, version: int, facts: Facts) -> Narrowable | str | None:
    """The node as it could be; a text: why not; None: it has nothing to do with float32."""
    floats = [v for v in (*node.inputs, *node.outputs) if v is not None and facts.dtype(v) == ir.DataType.FLOAT]
    unknown = any(v is not None and facts.dtype(v) is None for v in (*node.inputs, *node.outputs))
    if (not floats and not unknown) or (node.op_type in ("Constant", "Cast") and node.domain in STANDARD_DOMAINS):
        return None
    if node.domain not in STANDARD_DOMAINS:
        return f"it is no standard operator (domain {node.domain})"
    if bodies(node):
        return "it runs a body"
    if node.op_type in SUMS:
        return "it adds up inside, where no range can be seen"
    found = _positions(node.op_type, version, len(node.inputs), len(node.outputs))
    if found is None:
        return "it has no float16 form"
    inputs = [i for i in found[0] if _is_float(node.inputs, i, facts)]
    outputs = [i for i in found[1] if _is_float(node.outputs, i, facts)]
    if not inputs or (not outputs and node.op_type not in _EITHER):
        return "it makes no floats of floats"
    if unknown or any(facts.dtype(v) not in (None, ir.DataType.FLOAT) for v in _chosen(node, found)):
        return "its types are not known"
    return Narrowable(node, tuple(inputs), tuple(outputs))


def _is_float(values: Any, index: int, facts: Facts) -> bool:
    return values[index] is not None and facts.dtype(values[index]) == ir.DataType.FLOAT


def _chosen(node: ir.Node, found: tuple[tuple[int, ...], tuple[int, ...]]) -> list[ir.Value]:
    values = [node.inputs[i] for i in found[0]] + [node.outputs[i] for i in found[1]]
    return [v for v in values if v is not None]


@lru_cache(4096)
def _positions(op_type: str, version: int, inputs: int, outputs: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(inputs, outputs) of type variables that may be float32 and float16 and that an output has too."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    free = {c.type_param_str for c in schema.type_constraints if {_FLOAT, _HALF} <= set(c.allowed_type_strs)}
    sides = []
    for formal, count in ((schema.inputs, inputs), (schema.outputs, outputs)):
        sides.append([formal[min(i, len(formal) - 1)].type_str for i in range(count)] if formal else [])
    carried = free if op_type in _EITHER else free & set(sides[0]) & set(sides[1])
    if not carried:
        return None
    first, second = (tuple(i for i, kind in enumerate(side) if kind in carried) for side in sides)
    return first, second


def out_of_range(low: float, high: float, margin: float) -> str | None:
    """Why values from ``low`` to ``high`` do not fit float16; ``margin``: how many times larger others may be."""
    largest = max(abs(low), abs(high))
    if not np.isfinite(largest) or largest * margin > LARGEST:
        return f"reaches {largest:.3g}, and float16 ends at 65504"
    if 0 < largest < SMALLEST:
        return f"stays below {largest:.3g}, of which float16 keeps few digits or none"
    return None
