"""Whether anybody can tell -0.0 from 0.0: adding 0.0 makes one of the other, which most graphs forget at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.graph import attribute, constant_array, is_op

if TYPE_CHECKING:
    import onnx_ir as ir

_AS_IT_IS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_PRODUCTS = ("MatMul", "Gemm", "Conv")
_FORGETFUL = ("Exp", "Sigmoid", "Softmax")
"""Of either zero they make the same; a Softmax first subtracts the largest, and takes e to that."""
_FAR = 16
"""Nodes looked at before it is given up."""


def sign_of_zero_is_lost(value: ir.Value) -> bool:
    """Whether no output depends on the sign that zeros have in ``value``.

    Where they differ in that alone, so do sums of products and whatever moves them; a zero plus a number that is not
    zero is that number, and there it ends. Everything else is taken to tell (a quotient does: 1 / -0.0).
    """
    waiting, seen = [value], 0
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return False
        for use in value.uses():
            node, seen = use.node, seen + 1
            if seen > _FAR or not is_op(node, node.op_type):
                return False
            if _forgets(node, value):
                continue
            moved = node.op_type in _AS_IT_IS and use.idx == 0
            if not (moved or (node.op_type in _PRODUCTS and use.idx < 2)):
                return False
            waiting.append(node.outputs[0])
    return True


def _forgets(node: ir.Node, value: ir.Value) -> bool:
    """Whether the node makes the same of either zero, or adds something that is nowhere zero."""
    if node.op_type in _FORGETFUL:
        return True
    if node.op_type in ("Add", "Sub") and len(node.inputs) == 2:
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    elif node.op_type in ("Gemm", "Conv") and len(node.inputs) > 2 and attribute(node, "beta", 1.0) == 1.0:
        other = node.inputs[2]
    else:
        return False
    array = constant_array(other)
    return array is not None and array.dtype.kind in "fV" and bool((array != 0).all())
