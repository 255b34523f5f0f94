"""Is this a well-formed graph? Names defined before use, once; outputs produced; nesting bounded.

Cheap enough to run after every pass, and independent of operator schemas, so custom operators are no problem. Every
check is linear in the size of the model: one set of visible names is kept, and what a body adds to it leaves with it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, MutableSequence
from typing import TYPE_CHECKING

from graphopt.errors import InternalError, ModelError
from graphopt.external import shown

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    _Nodes = MutableSequence[onnx.NodeProto]

MAX_NESTING = 30
"""Graphs in graphs. Real models nest two or three deep; protobuf readers stop at 100 messages, three per graph."""


def check_proto(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what no reader could make sense of.

    Nodes that are out of order but not cyclic are put in order, stably, in ``proto``: the standard forbids them, ONNX
    Runtime runs them, the data dependencies leave no doubt about what is meant, and nothing else here need then care.

    Raises:
        ModelError: with the first problem found, naming the value or node.
    """
    if not proto.opset_import and proto.ir_version >= 3:
        raise ModelError(f"{where} declares no opset; export it again")
    if not proto.graph.output:
        raise ModelError(f"{where} has no outputs, so it makes nothing; export it again")
    problem = _names_problem(proto) or _graph_problem(proto.graph, set(), 0) or _functions_problem(proto)
    if problem:
        raise ModelError(f"{where} is not a valid ONNX model: {problem}; export it again")


def _names_problem(proto: onnx.ModelProto) -> str | None:
    domains = [opset.domain for opset in proto.opset_import]
    if len(set(domains)) != len(domains):
        return f"operator set '{shown(_twice(domains))}' is imported twice"
    for text in (proto.graph.name, proto.domain, proto.doc_string, proto.producer_name, *domains):
        if isinstance(text, bytes):
            return f"'{shown(text)}' is no text (UTF-8)"
    return None


def _twice(names: list[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("called on a list with a name that occurs twice")


def _graph_problem(graph: onnx.GraphProto, visible: set[str], depth: int) -> str | None:
    """``visible`` holds the names of the outer graphs, and holds the same again on return."""
    if depth > MAX_NESTING:
        return f"subgraphs are nested more than {MAX_NESTING} deep"
    inputs = [v.name for v in graph.input]
    if len(set(inputs)) != len(inputs):
        return f"input '{shown(_twice(inputs))}' is listed twice"
    initializers = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    if len(set(initializers)) != len(initializers):
        return f"initializer '{shown(_twice(initializers))}' is defined twice"
    if "" in inputs or "" in initializers:
        return "an input or initializer has no name"
    local = {*inputs, *initializers}
    problem = _nodes_problem(graph.node, local, visible, depth)
    if problem:
        return problem
    outputs = [v.name for v in graph.output]
    missing = next((name for name in outputs if name not in local), None)
    if missing is not None and missing in visible:
        return f"output '{shown(missing)}' of a body is a value of the graph around it, with no Identity between"
    if missing is not None:
        return f"output '{shown(missing)}' is made by nothing"
    if len(set(outputs)) != len(outputs):
        return f"output '{shown(_twice(outputs))}' is listed twice"
    return None


def _nodes_problem(nodes: _Nodes, local: set[str], visible: set[str], depth: int) -> str | None:
    """Also adds to ``local`` the names these nodes make."""
    made = [name for node in nodes for name in node.output if name]
    if len(made) != len(set(made)) or not local.isdisjoint(made):
        seen = set(local)
        for index, node in enumerate(nodes):
            for name in node.output:
                if name and name in seen:
                    return f"{_label(node, index)} makes '{shown(name)}' a second time"
                seen.add(name)
    added = local - visible
    visible |= added
    try:
        problem = _sort(nodes) if _out_of_order(nodes, visible, set(made)) else None
        if problem:
            return problem
        for index, node in enumerate(nodes):
            problem = _node_problem(node, index, visible, depth)
            if problem:
                return problem
            for name in node.output:
                if name and name not in visible:
                    visible.add(name)
                    added.add(name)
    finally:
        visible -= added
    local.update(made)
    return None


def _node_problem(node: onnx.NodeProto, index: int, visible: set[str], depth: int) -> str | None:
    label = _label(node, index)
    if not node.op_type:
        return f"node {index} has no operator type"
    for text in (node.name, node.op_type, node.domain, node.doc_string, *node.input, *node.output):
        if isinstance(text, bytes):
            return f"{label} has a name that is no text (UTF-8)"
    for name in node.input:
        if name and name not in visible:
            return f"{label} reads '{shown(name)}', which nothing makes"
    for attribute in node.attribute:
        for body in _bodies(attribute):
            problem = _graph_problem(body, visible, depth + 1)
            if problem:
                return f"{problem} (in a body of {label})" if depth == 0 else problem
    return None


def _label(node: onnx.NodeProto, index: int) -> str:
    return f"node '{shown(node.name) or index}' ({shown(node.op_type)})"


def _bodies(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node and its bodies read; a body's own names among them, which do no harm where names are unique."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield from current.input
        for attribute in current.attribute:
            for body in _bodies(attribute):
                stack.extend(body.node)


def _out_of_order(nodes: _Nodes, visible: set[str], made: set[str]) -> bool:
    """Whether a node reads directly what a later one of the same graph makes."""
    later = made - visible
    for node in nodes:
        if not later.isdisjoint(_reads(node)) and any(name in later for name in _free(node)):
            return True
        later.difference_update(node.output)
    return False


def _free(node: onnx.NodeProto) -> Iterator[str]:
    """The names a node reads from the graph it stands in: its inputs, and what its bodies do not define themselves."""
    yield from node.input
    for attribute in node.attribute:
        for body in _bodies(attribute):
            own = {v.name for v in body.input} | {t.name for t in body.initializer}
            own |= {t.values.name for t in body.sparse_initializer} | {n for m in body.node for n in m.output}
            for inner in body.node:
                yield from (name for name in _free(inner) if name not in own)


def _order(nodes: _Nodes) -> tuple[list[int], list[set[int]]]:
    """An order that works, as close to the one given as can be (shorter than ``nodes``: there is a cycle), and for each
    node the nodes it reads from."""
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    sources = [{producer[name] for name in _free(node) if name in producer} for node in nodes]
    users: dict[int, list[int]] = {}
    for index, reads in enumerate(sources):
        for source in reads:
            users.setdefault(source, []).append(index)
    waiting = [len(reads) for reads in sources]
    ready = [index for index, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for user in users.get(order[-1], ()):
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, user)
    return order, sources


def _sort(nodes: _Nodes) -> str | None:
    """Put ``nodes`` in order; what is wrong where there is none."""
    order, sources = _order(nodes)
    left = set(range(len(nodes))).difference(order)
    if left:  # each of these reads from another of them: walking backwards ends on a cycle
        index, seen = min(left), set[int]()
        while index not in seen:
            seen.add(index)
            index = min(sources[index] & left)
        return f"{_label(nodes[index], index)} depends on its own output (a cycle)"
    done = [nodes[index] for index in order]
    del nodes[:]
    nodes.extend(done)
    return None


def _functions_problem(proto: onnx.ModelProto) -> str | None:
    calls: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for function in proto.functions:
        title = f"function '{shown(function.domain)}::{shown(function.name)}'"
        identity = (_domain(function.domain), function.name, function.overload)
        if identity in calls:
            return f"{title} is defined twice"
        local = set(function.input)
        if len(local) != len(function.input):
            return f"{title} has an input twice"
        problem = _nodes_problem(function.node, local, set(), 1)
        missing = next((name for name in function.output if name not in local), None)
        if problem or missing is not None:
            return f"{problem or f'output {shown(missing or str())!r} is made by nothing'} (in {title})"
        calls[identity] = set()
        stack = list(function.node)
        while stack:
            node = stack.pop()
            calls[identity].add((_domain(node.domain), node.op_type, node.overload))
            stack.extend(n for a in node.attribute for body in _bodies(a) for n in body.node)
    return _recursion(calls)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _recursion(calls: dict[tuple[str, ...], set[tuple[str, ...]]]) -> str | None:
    left = {name: {c for c in called if c in calls} for name, called in calls.items()}
    users: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name, called in left.items():
        for callee in called:
            users.setdefault(callee, []).append(name)
    ready = [name for name, called in left.items() if not called]
    while ready:
        name = ready.pop()
        del left[name]
        for user in users.get(name, ()):
            left[user].discard(name)
            if not left[user]:
                ready.append(user)
    return f"function '{shown('::'.join(min(left)[:2]))}' calls itself" if left else None


def check_model(model: ir.Model, after: str) -> None:
    """The same after a pass, on the working copy.

    Raises:
        InternalError: the pass ``after`` broke the graph.
    """
    problem = model_problem(model)
    if problem:
        raise InternalError(f"pass '{after}' left a broken graph: {problem}")


def model_problem(model: ir.Model) -> str | None:
    """The first thing wrong with the graph or a function's, or None."""
    problem = _ir_problem(model.graph, set(), 0)
    for function in model.functions.values():
        problem = problem or _ir_problem(function.graph, set(), 0)
    return problem


def _ir_problem(graph: ir.Graph, visible: set[ir.Value], depth: int) -> str | None:
    """``visible`` holds the values of the outer graphs, and holds the same again on return."""
    if depth > MAX_NESTING:
        return f"subgraphs are nested more than {MAX_NESTING} deep"
    names: dict[str, ir.Value] = {}
    inputs = set(graph.inputs)
    known = inputs | set(graph.initializers.values())
    if len(inputs) != len(graph.inputs):
        return "an input is listed twice"
    for value in (*graph.inputs, *graph.initializers.values()):
        if not value.name or names.setdefault(value.name, value) is not value:
            return f"two values are named '{value.name}'" if value.name else "an input or initializer has no name"
    for name, value in graph.initializers.items():
        if value.name != name:
            return f"initializer '{name}' is filed under another name than its own, '{value.name}'"
        if value.const_value is None and value not in inputs:
            return f"initializer '{name}' has no data"
    added = known - visible
    visible |= added
    try:
        for node in graph:
            problem = _ir_node_problem(node, visible, depth)
            if problem:
                return problem
            for value in node.outputs:
                if value.name and names.setdefault(value.name, value) is not value:
                    return f"two values are named '{value.name}'"
                known.add(value)
                added.add(value)
                visible.add(value)
    finally:
        visible -= added
    missing = next((value for value in graph.outputs if value not in known), None)
    return None if missing is None else f"output '{missing.name}' is made by nothing"


def _ir_node_problem(node: ir.Node, visible: set[ir.Value], depth: int) -> str | None:
    import onnx_ir as ir

    for read in node.inputs:
        if read is not None and read not in visible:
            return f"node '{node.name}' ({node.op_type}) reads '{read.name}' before it is made"
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        bodies = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
        for body in bodies:
            problem = _ir_problem(body, visible, depth + 1)
            if problem:
                return f"{problem} (in a body of '{node.name}')"
    return None
