"""What ONNX Runtime does not refuse but dies of, and whoever loaded it with it: found before it is given the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphopt.external import shown

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

MOVES = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that the runtime moves a pair of QuantizeLinear and DequantizeLinear through (its QDQPropagation)."""


WAY_ROUND = "put a Mean of that one input behind the DequantizeLinear"
"""The runtime sees through Identity; what copies otherwise holds the pair where it is."""


def moved_into_bodies(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The readers of what ``node`` makes, with the input each reads, that move it on to a body: :func:`fatal` behind a
    DequantizeLinear."""
    uses = [use for value in node.outputs for use in value.uses()]
    return [(user, index) for user, index in uses if user.graph is node.graph and _hands_on(user)]


def _hands_on(node: ir.Node) -> bool:
    seen, left = {node}, [node]
    while left:  # no recursion, and each once: chains may be long, and branch
        mover = left.pop()
        if mover.op_type not in MOVES:
            continue
        readers = {user for value in mover.outputs for user, _ in value.uses()}
        if any(user.graph is not node.graph for user in readers):
            return True
        left += readers - seen
        seen |= readers
    return False


def fatal(graph: onnx.GraphProto) -> str | None:
    """Why loading ``graph`` with optimizations would end the process; None where nothing is known to.

    In 1.32: a dequantized value that is moved and then read by a body from outside. The runtime writes a pair on every
    edge behind the move, and an edge into a body has no position among its node's inputs. (Seen for each of
    :data:`MOVES`, into If and Loop; with optimizations off, and through other operators, it loads.)
    """
    inner = [body for node in graph.node for body in _bodies(node)]
    if not inner:
        return None
    moved: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" or (node.op_type in MOVES and node.input and node.input[0] in moved):
            first = node.output[0] if node.op_type == "DequantizeLinear" else moved[node.input[0]]
            moved |= dict.fromkeys(node.output, first)
    reach = moved.keys() - set(moved.values())
    read = reach & {name for body in inner for name in _read(body)} if reach else set()
    if read:
        name = min(read)
        return (
            f"ONNX Runtime would end the process: '{shown(name)}' is dequantized ('{shown(moved[name])}'), moved, and "
            f"read by a body from outside; {WAY_ROUND}"
        )
    return next((found for body in inner if (found := fatal(body)) is not None), None)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in ((a.g,) if a.HasField("g") else a.graphs)]


def _read(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that ``graph`` and its bodies read and do not make."""
    made = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    made |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        yield from (name for name in node.input if name not in made)
        for body in _bodies(node):
            yield from (name for name in _read(body) if name not in made)
    yield from (v.name for v in graph.output if v.name not in made)
