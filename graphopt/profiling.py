"""Where the time goes: the runtime's profile, attached to the names our nodes have.

ONNX Runtime runs other nodes than the model has: it fuses them, renames them, and adds its own between them. It says
what it runs by name, and the optimized graph says what that writes; a name or an output that the model knows leads back
to the node it came from. What neither leads back is reported under the runtime's own name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.graph import label, nodes
from graphopt.session import Session

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from graphopt.session import Feeds

_LEAST_RUNS = 5
_DEEPEST = 3
"""Nodes that the runtime fuses into one before them, at most."""
_KERNEL = "_kernel_time"
_ADDED = re.compile(r"(_token_\d+|_nchwc|_quant|/duplicated|_\d+/duplicated|_matmul|_add)$")
"""What the runtime appends to a name when it copies, blocks or fuses the node."""
_FUSED = re.compile(r"^(fused |fused_)")


@dataclass
class NodeTime:
    """One node of ours, with those that the runtime ``fused`` into it: ``seconds`` per run, in nodes that the runtime
    calls ``runtime`` (operator, name). ``node`` None: the runtime's own, which nothing leads back to us."""

    node: str | None
    op_type: str | None
    fused: tuple[str, ...] = ()
    seconds: float = 0.0
    runtime: dict[tuple[str, str], float] = field(default_factory=dict)

    def as_dict(self, total: float) -> dict[str, Any]:
        """As the report has it; ``total``: seconds of all nodes."""
        return {
            "node": self.node,
            "op_type": self.op_type,
            "fused": list(self.fused),
            "seconds": self.seconds,
            "share": self.seconds / total if total else 0.0,
            "runtime": [
                {"op_type": op, "name": name, "seconds": seconds} for (op, name), seconds in self.runtime.items()
            ],
        }


@dataclass(frozen=True)
class Ran:
    """One node as the runtime ran it: ``seconds`` per run, and the values it ``reads`` and ``writes`` there."""

    name: str
    op_type: str
    seconds: float
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def profile(
    model: ir.Model, feeds: Sequence[Feeds], *, threads: int | None = 1, seconds: float = 1.0
) -> tuple[list[NodeTime], int]:
    """Median time of each node, the slowest first, and how many runs it is the median of.

    Recording costs time of its own, about a microsecond a node, so small nodes look heavier than they are.

    Raises:
        RuntimeFailure: the model does not load or run.
    """
    (found,), runs = recorded([model], feeds, threads=threads, seconds=seconds)
    return attached(model, found), runs


def recorded(
    models: Sequence[ir.Model],
    feeds: Sequence[Feeds],
    *,
    threads: int | None = 1,
    seconds: float = 1.0,
    rank: float = 0.5,
) -> tuple[list[list[Ran]], int]:
    """What the runtime ran for each of ``models``, run in turn so that what else the machine does meets all alike.

    ``rank`` is the quantile over the runs that stands for a node: 0.5 is the median.
    """
    for model in models:  # recording cannot be paused, so twins warm the caches
        warm = Session(model, threads=threads)
        for feed in feeds:
            warm.run(feed)
    sessions = [Session(model, threads=threads, profile=True, timed=True) for model in models]
    started, runs = time.perf_counter(), 0
    while runs < _LEAST_RUNS or time.perf_counter() - started < seconds:
        for session in sessions:
            session.run(feeds[runs % len(feeds)])
        runs += 1
    return [_ran(*session.profiled(), runs, rank) for session in sessions], runs


def _ran(events: Sequence[Mapping[str, Any]], optimized: onnx.GraphProto, runs: int, rank: float) -> list[Ran]:
    spent: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            key = (name.removesuffix(_KERNEL), str(event.get("args", {}).get("op_name", "")))
            spent.setdefault(key, []).append(float(event.get("dur", 0)) * 1e-6)
    known = {node.name: node for node in optimized.node}
    found = []
    for (name, op_type), times in spent.items():
        # In a body it runs more than once, or not every time.
        seconds = float(np.quantile(times, rank)) * len(times) / runs
        node = known.get(name)
        reads, writes = (tuple(node.input), tuple(node.output)) if node is not None else ((), ())
        found.append(Ran(name, op_type, seconds, reads, writes))
    return found


def attached(model: ir.Model, ran: Sequence[Ran]) -> list[NodeTime]:
    """What the runtime ran as times of our nodes, the slowest first."""
    find = Origins(model)
    found: dict[str, NodeTime] = {}
    for one in ran:
        origin, fused = find(one)
        key = f"({one.name})" if origin is None else label(origin)
        if key not in found:
            found[key] = NodeTime(None, None) if origin is None else NodeTime(key, origin.op_type)
        entry = found[key]
        entry.fused = entry.fused or fused
        entry.runtime[one.op_type, one.name] = one.seconds
        entry.seconds += one.seconds
    return sorted(found.values(), key=lambda n: (-n.seconds, n.node or ""))


class Origins:
    """Leads what the runtime ran back to the nodes of ``model``."""

    def __init__(self, model: ir.Model) -> None:
        self._by_name: dict[str, ir.Node] = {}
        self._by_output: dict[str, ir.Node] = {}
        for node in nodes(model):
            if node.name:
                self._by_name.setdefault(node.name, node)
            for value in node.outputs:
                if value.name:
                    self._by_output[value.name] = node

    def __call__(self, one: Ran) -> tuple[ir.Node | None, tuple[str, ...]]:
        """The node of ours that it came from (None: the runtime's own), and the nodes that are fused into that."""
        return _unfused(_origin(one.name, one.writes, self._by_name, self._by_output), one.op_type)


def _origin(
    name: str, outputs: Sequence[str], by_name: Mapping[str, ir.Node], by_output: Mapping[str, ir.Node]
) -> ir.Node | None:
    """The node of ours that the runtime's node ``name``, which writes ``outputs``, came from."""
    for candidate in (name, *_stripped(name)):
        if candidate in by_name:
            return by_name[candidate]
    for output in outputs:
        for candidate in (output, *_stripped(output)):
            if candidate in by_output:
                return by_output[candidate]
    # Nodes without a name are called after what they write.
    return next((by_output[c] for c in (name, *_stripped(name)) if c in by_output), None)


def _unfused(node: ir.Node | None, op_type: str) -> tuple[ir.Node | None, tuple[str, ...]]:
    """What the runtime computes as one ``op_type`` ending in ``node``: the node of that type, and what follows it.

    A convolution that took in a BatchNormalization and a Clip goes by the name of what the Clip writes.
    """
    wanted = {op_type, op_type.removeprefix("QLinear"), op_type.removeprefix("Fused")}
    wanted |= {"MatMul"} if "Gemm" in op_type else set()
    fused: list[str] = []
    at = node
    while at is not None and at.op_type not in wanted:
        if len(fused) == _DEEPEST or not at.inputs or at.inputs[0] is None:
            return node, ()
        fused.insert(0, label(at))
        at = at.inputs[0].producer()
    return (node, ()) if at is None else (at, tuple(fused))


def _stripped(name: str) -> list[str]:
    found = []
    name = _FUSED.sub("", name)
    found.append(name)
    while (shorter := _ADDED.sub("", name)) != name:
        name = shorter
        found.append(name)
    return found
