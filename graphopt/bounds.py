"""What integer inputs may be without the model refusing them, from what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphopt.external import all_graphs
from graphopt.graph import attribute, constant, is_op, nodes
from graphopt.model import ValueSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_ID_STEPS = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
"""What may stand between an id and the Gather that uses it without changing its value."""


def is_mask(spec: ValueSpec) -> bool:
    """Whether an input is an attention mask, as far as its name says."""
    return "mask" in spec.name.casefold() and spec.dtype is not None and spec.dtype.kind in "iuf"


def input_bounds(model: ir.Model, inputs: Sequence[ValueSpec]) -> dict[str, tuple[float, float]]:
    """Masks get 0 and 1; integer inputs that index a table get its size as their bound. With an STFT around none of
    them is 0: ONNX Runtime 1.32 divides by the length of its frames, and the processor stops the whole process."""
    bounds: dict[str, tuple[float, float]] = {spec.name: (0, 1) for spec in inputs if is_mask(spec)}
    wanted = {spec.name for spec in inputs if spec.dtype is not None and spec.dtype.kind in "iu"}
    if any(node.op_type == "STFT" for graph in all_graphs(model) for node in graph):
        bounds |= dict.fromkeys(wanted - bounds.keys(), (1, 9))
    for node in nodes(model):
        if not is_op(node, "Gather", "GatherElements") or len(node.inputs) < 2:
            continue
        table, index = node.inputs[0], node.inputs[1]
        while index is not None and is_op(producer := index.producer(), *_ID_STEPS):
            assert producer is not None
            index = producer.inputs[0]
        if table is None or index is None or index.name not in wanted:
            continue
        tensor = constant(table)
        shape = tensor.shape if tensor is not None else table.shape
        axis = attribute(node, "axis", 0)
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        if isinstance(size, int) and size > 0:
            low, high = bounds.get(index.name, (0, size - 1))
            bounds[index.name] = (min(low, size - 1), min(high, size - 1))
    return bounds
