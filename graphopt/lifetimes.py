"""Which values live when: nodes and weights that reach no output, and the most memory that activations take at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx

from graphopt.model import graphs
from graphopt.values import Values, bodies
from graphopt.weights import Weight, text
from graphopt.workload import label


def free(node: onnx.NodeProto) -> set[str]:
    """The names a node reads from the graph it stands in, those that its bodies read among them."""
    found = {name for name in node.input if name}
    for body in bodies(node):
        found |= _wanted(body) - _own(body)
    return found


def _wanted(graph: onnx.GraphProto) -> set[str]:
    found = {v.name for v in graph.output}
    for node in graph.node:
        found |= free(node)
    return found


def _own(graph: onnx.GraphProto) -> set[str]:
    found = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    found |= {s.values.name for s in graph.sparse_initializer}
    return found | {name for node in graph.node for name in node.output}


def _live(graph: onnx.GraphProto) -> tuple[set[str], int]:
    """(names that reach an output of ``graph``, how many nodes do not), whatever order the nodes stand in."""
    nodes = list(graph.node)
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    live = {v.name for v in graph.output}
    live |= {p.value for a in graph.quantization_annotation for p in a.quant_parameter_tensor_names}
    waiting, alive = list(live), set[int]()
    while waiting:
        index = maker.get(waiting.pop())
        if index is not None and index not in alive:
            alive.add(index)
            added = free(nodes[index]) - live
            live |= added
            waiting += added
    return live, len(nodes) - len(alive)


def dead(proto: onnx.ModelProto, weights: Iterable[Weight]) -> tuple[list[Weight], int]:
    """(weights that no output depends on, how many nodes compute for nothing)."""
    living, idle = [], 0
    for graph in graphs(proto):
        live, unused = _live(graph)
        living.append({text(name) for name in live})
        idle += unused
    found = [
        w
        for w in weights
        if w.where != "attribute" and w.graph >= 0 and w.name.removesuffix(" (indices)") not in living[w.graph]
    ]
    return sorted(found, key=lambda w: (-(w.bytes or 0), w.name)), idle


@dataclass(frozen=True)
class Peak:
    """Bytes of activations at once, and of how many values the size is unknown; weights are not in it."""

    bytes: int
    unknown: int
    node: str | None

    def as_dict(self) -> dict[str, Any]:
        """For the report: ``bytes`` None where no size is known."""
        nothing = self.unknown > 0 and not self.bytes
        return {"bytes": None if nothing else self.bytes, "unknown_values": self.unknown, "node": self.node}


def peak(values: Values) -> Peak:
    """Nodes in the file's order, each output in memory of its own, let go after its last reader."""
    kept = list(graphs(values.proto))  # held, so that the same body is the same object
    numbers = {id(graph): index for index, graph in enumerate(kept)}
    return _peak(kept[0], numbers, values)


def _peak(graph: onnx.GraphProto, numbers: dict[int, int], values: Values) -> Peak:
    scope = values.scopes[numbers[id(graph)]]
    stored = {t.name for t in graph.initializer}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        last.update(dict.fromkeys(free(node), index))
    last.update({v.name: len(graph.node) for v in graph.output})
    sizes: dict[str, int] = {}
    unknown = 0

    def take(name: str) -> int:
        nonlocal unknown
        known = scope.get(text(name))
        size = known.bytes if known is not None else None
        unknown += size is None
        sizes[name] = size or 0
        return sizes[name]

    now = sum(take(v.name) for v in graph.input if v.name not in stored)
    most, where = now, None
    ends: dict[int, list[str]] = {}
    for name in sizes:
        ends.setdefault(last.get(name, len(graph.node)), []).append(name)
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant":
            continue
        for name in node.output:
            if name:
                now += take(name)
                ends.setdefault(last.get(name, index), []).append(name)
        inner = [_peak(body, numbers, values) for body in bodies(node) if id(body) in numbers]
        unknown += sum(one.unknown for one in inner)
        there = now + max((one.bytes for one in inner), default=0)
        if there > most:
            most, where = there, label(node)
        now -= sum(sizes[name] for name in ends.pop(index, ()))
    return Peak(most, unknown, where)
