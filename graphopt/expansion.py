"""How large a model becomes once it is read: functions that call functions, lists joined with themselves.

Asked before shape inference or the runtime see the file, since neither would get to the end of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graphopt import budgets
from graphopt.errors import OverBudget
from graphopt.external import shown
from graphopt.residue import graphs

if TYPE_CHECKING:
    import onnx

    Identity = tuple[str, str, str]

_GROWN = 2**22
"""Elements that lists may grow to by being joined, beyond what was there: shape inference carries them in full."""
_KEEPING = frozenset(
    {"Identity", "Cast", "Relu", "Neg", "Abs", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Flatten"}
)


def check_readable(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what shape inference or the runtime would not get to the end of reading.

    Raises:
        OverBudget: its functions make too many nodes or call each other too deep, or joined lists grow without bound.
    """
    problem = _functions_problem(proto) or _joined_problem(proto)
    if problem:
        raise OverBudget(f"{where} {problem}")


def _functions_problem(proto: onnx.ModelProto) -> str | None:
    """Functions that call themselves are somebody else's to refuse; here they count as nothing."""
    allowed = budgets.current()
    if not proto.functions:
        return None
    bodies = {(_domain(f.domain), f.name, f.overload): f.node for f in proto.functions}
    nodes: dict[Identity, int] = {}
    depth: dict[Identity, int] = {}
    written = 0
    for identity in _callees_first(bodies):
        called = list(_all_nodes(bodies[identity]))
        written += len(called)
        of = [_identity(n) for n in called]
        nodes[identity] = sum(nodes.get(o, 1) for o in of)
        depth[identity] = 1 + max((depth.get(o, 0) for o in of), default=0)
    main = [_identity(node) for node in _all_nodes(proto.graph.node)]
    made = sum(nodes[i] for i in main if i in nodes)
    deepest = max(depth.values(), default=0)
    room = allowed.allowed_nodes(written + len(main))
    if made > room:
        return (
            f"would be {rounded(made)} nodes once its functions are put in, more than {room}; "
            "raise --max-nodes if you trust it"
        )
    if deepest > allowed.calls:
        return f"has functions that call each other {deepest} deep, more than {allowed.calls}; inline them"
    return None


def _callees_first(bodies: Mapping[Identity, Any]) -> Iterator[Identity]:
    """Each function after those it calls; without recursion, since the calls may be thousands deep."""
    done: set[Identity] = set()
    for start in bodies:
        stack = [(start, False)]
        open_: set[Identity] = set()
        while stack:
            identity, ready = stack.pop()
            if ready:
                open_.discard(identity)
                if identity not in done:
                    done.add(identity)
                    yield identity
            elif identity not in done and identity not in open_:
                open_.add(identity)
                stack.append((identity, True))
                called = {_identity(node) for node in _all_nodes(bodies[identity])}
                stack += [(c, False) for c in called if c in bodies and c not in done]


def _all_nodes(nodes: Any) -> Iterator[onnx.NodeProto]:
    """These and those of their bodies."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                stack.extend(attribute.g.node)
            for body in attribute.graphs:
                stack.extend(body.node)


def _identity(node: onnx.NodeProto) -> Identity:
    return _domain(node.domain), node.op_type, node.overload


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _joined_problem(proto: onnx.ModelProto) -> str | None:
    """Concat of a value with itself, again and again."""
    every = [*(g.node for g in graphs(proto)), *(f.node for f in proto.functions)]
    if not any(
        node.op_type == "Concat" and len(set(node.input)) < len(node.input) for nodes in every for node in nodes
    ):
        return None
    sizes = {t.name: math.prod(t.dims) for g in graphs(proto) for t in g.initializer}
    limit = _GROWN + 4 * sum(sizes.values())
    for nodes in every:
        for node in nodes:
            if not node.output:
                continue
            if node.op_type == "Concat":
                size = sum(sizes.get(name, 1) for name in node.input)
                if size > limit:
                    return (
                        f"joins a list with itself until it has {rounded(size)} elements "
                        f"({shown(node.output[0])}); is it the right file?"
                    )
                sizes[node.output[0]] = size
            elif node.op_type in _KEEPING and node.input:
                sizes[node.output[0]] = sizes.get(node.input[0], 1)
    return None


def rounded(number: int) -> str:
    """A number for a message, whatever its size."""
    return f"{number:,}" if number < 10**9 else f"over 1e{len(str(number)) - 1}"
