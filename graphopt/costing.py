"""What a run of a model would take, found without running it: bytes of its values, trips of its loops.

Everything here is a lower bound, linear in the size of the file: symbolic dims count as 1, and what is not known as
nothing. What only running can tell is watched while it runs (:mod:`graphopt.session`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt import budgets
from graphopt.errors import OverBudget
from graphopt.expansion import rounded
from graphopt.external import shown
from graphopt.propagation import Types, complete, inferred
from graphopt.residue import graphs

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_KEY = "graphopt.estimate"
_SMALL = 1024
"""Elements up to which a weight's numbers are of use to shape inference."""
_BY_DATA = frozenset({"ConstantOfShape", "Expand", "Tile", "Range", "Reshape", "Pad", "Resize", "Upsample", "OneHot"})
"""Operators the size of whose result hangs on numbers, which have to be followed."""


@dataclass(frozen=True)
class Estimate:
    """``problem`` says why the model is not to be run; ``loops``: trips are not known beforehand; ``unknown``: so is
    the size of a value; ``held``: bytes of the weights."""

    problem: str | None = None
    loops: bool = False
    unknown: bool = False
    held: int = 0


NOTHING = Estimate()
"""Of what nobody estimated: pieces of models, made by those who know them."""


def check_runnable(model: ir.Model, proto: onnx.ModelProto) -> Estimate:
    """What is known beforehand of a run of ``model`` (``proto`` is the same, written out); found once for it and its
    clones, since passes that keep what a model does keep what it takes.

    Raises:
        OverBudget: it would take more than it may.
    """
    kept = model.meta.setdefault(_KEY, {})
    key = budgets.current()
    if key not in kept:
        kept[key] = estimate(proto)
    found: Estimate = kept[key]
    if found.problem:
        raise OverBudget(found.problem)
    return found


def started(model: ir.Model) -> None:
    """A model that was just loaded: its clones share what is found out about it."""
    model.meta[_KEY] = {}


def estimate(proto: onnx.ModelProto) -> Estimate:
    """The least that one run takes."""
    bare, held = _bare(proto)
    types, unknown = _types(bare)
    kept = list(graphs(bare))  # held, so that the same body is the same object
    loops = _Loops(types)
    loops.walk(bare.graph, 1, {})
    allowed = budgets.current()
    if loops.steps > allowed.steps:
        problem = (
            f"the model's loops run {rounded(loops.steps)} nodes, more than fit into {allowed.seconds:g} s; raise "
            "--max-seconds if you trust it"
        )
        return Estimate(problem)
    inputs = sum(_bytes(types[0].get(v.name)) for v in bare.graph.input)
    room = allowed.allowed(held + inputs)
    size, where = _most(kept, types, loops.trips)
    if size > room:
        problem = (
            f"running the model would take at least {_human(size)} ({where}), more than the {_human(room)} allowed to "
            f"one of its size; raise --max-memory if you trust it"
        )
        return Estimate(problem)
    return Estimate(None, loops.unknown, unknown, held)


def _bare(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A copy for shape inference, functions inlined, large weights declared instead of stored, symbolic dims 1; and the
    bytes of all weights."""
    import onnx

    bare = onnx.ModelProto(ir_version=proto.ir_version)
    bare.opset_import.extend(proto.opset_import)
    bare.functions.extend(proto.functions)
    graph, source = bare.graph, proto.graph
    graph.name = "estimate"
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.sparse_initializer.extend(source.sparse_initializer)
    listed = {v.name for v in source.input}
    for tensor in source.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    held = sum(_tensor_bytes(t) for g in graphs(proto) for t in g.initializer)
    if bare.functions:
        import onnx.inliner

        try:
            bare = onnx.inliner.inline_local_functions(bare)
        except Exception:  # calls then count as nothing
            del bare.functions[:]
    for value in bare.graph.input:
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                dim.dim_value = 1
    for value in bare.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    return bare, held


def _types(bare: onnx.ModelProto) -> tuple[list[Types], bool]:
    """Types and shapes of each graph's values, and whether some are not known; ``bare`` becomes the inferred model."""

    with contextlib.suppress(Exception):  # a hint, never a requirement
        bare.CopyFrom(inferred(bare))
    found = list(graphs(bare))
    types: list[Types] = []
    for graph in found:
        scope: Types = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            if value.type.HasField("tensor_type") and tensor.HasField("shape"):
                dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
                if all(d >= 0 for d in dims):
                    scope[value.name] = (tensor.elem_type, dims)
        types.append(scope)
    if any(node.op_type in _BY_DATA for graph in found for node in graph.node):
        complete(bare, found, types)
    unknown = any(
        name and name not in scope
        for graph, scope in zip(found, types, strict=True)
        for node in graph.node
        for name in node.output
    )
    return types, unknown


@dataclass
class _Loops:
    """Nodes that loops run, as far as their trips are known; ``trips`` of each body."""

    types: list[Types]
    steps: int = 0
    unknown: bool = False

    def __post_init__(self) -> None:
        self.trips: dict[int, int] = {}

    def walk(self, graph: onnx.GraphProto, times: int, constants: Mapping[str, int]) -> None:
        """``times``: how often ``graph`` runs; ``constants``: whole numbers that outer graphs store."""
        constants = {**constants, **dict(_numbers(graph))}
        for node in graph.node:
            inner = [a.g for a in node.attribute if a.HasField("g")]
            if not inner:
                continue
            trips = 1
            if node.op_type == "Loop":
                known = constants.get(node.input[0]) if node.input and node.input[0] else None
                self.unknown |= known is None
                trips = max(known or 0, 0) if not _conditional(node) else 1
                self.unknown |= _conditional(node)
            for body in inner:
                self.steps += times * trips * len(body.node)
                self.trips[id(body)] = trips
                self.walk(body, times * trips, constants)


def _conditional(loop: onnx.NodeProto) -> bool:
    """Whether the body itself may end the loop: its condition is not handed through from what came in."""
    body = next(a.g for a in loop.attribute if a.HasField("g"))
    if not body.output or len(body.input) < 2:
        return True
    name = body.output[0].name
    maker = {output: node for node in body.node for output in node.output}
    while name in maker and maker[name].op_type == "Identity" and maker[name].input:
        name = maker[name].input[0]
    return bool(name != body.input[1].name)


def _numbers(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    from onnx import TensorProto, numpy_helper

    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.INT64 and math.prod(tensor.dims) == 1:
            yield tensor.name, int(numpy_helper.to_array(tensor).reshape(-1)[0])
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            for attribute in node.attribute:
                if attribute.name == "value_int":
                    yield node.output[0], attribute.i
                elif attribute.t.data_type == TensorProto.INT64 and math.prod(attribute.t.dims) == 1:
                    yield node.output[0], int(numpy_helper.to_array(attribute.t).reshape(-1)[0])


def _most(found: list[onnx.GraphProto], types: list[Types], trips: Mapping[int, int]) -> tuple[int, str]:
    """The most bytes that values take at once, and the node that makes the largest of them.

    What only constants go into is counted as if it stayed (the runtime stores it when it loads the model), the rest
    until its last reader. A Loop keeps what its body's further outputs make in every trip.
    """
    number = {id(graph): index for index, graph in enumerate(found)}
    most, where, largest = 0, "its inputs", 0
    for graph in found:
        scope = types[number[id(graph)]]
        last = {name: index for index, node in enumerate(graph.node) for name in node.input}
        last |= {v.name: len(graph.node) for v in graph.output}
        constant = {t.name for t in graph.initializer}
        now = sum(_bytes(scope.get(v.name)) for v in graph.input)
        ends: dict[int, int] = {}
        for index, node in enumerate(graph.node):
            size = sum(_bytes(scope.get(name)) for name in node.output)
            size = max(
                size, *(_collected(a.g, types[number[id(a.g)]], trips) for a in node.attribute if a.HasField("g")), 0
            )
            now += size
            if now > most:
                most = now
            if size > largest:
                largest, where = size, f"node '{shown(node.name) or index}' ({shown(node.op_type)})"
            if all(name in constant or not name for name in node.input) and not node.op_type.startswith("Random"):
                constant.update(node.output)
            else:
                end = max((last.get(name, index) for name in node.output), default=index)
                ends[end] = ends.get(end, 0) + size
            now -= ends.pop(index, 0)
    return most, where


def _collected(body: onnx.GraphProto, scope: Types, trips: Mapping[int, int]) -> int:
    """Bytes of what a loop's body makes anew in each trip, all trips together."""
    carried = max(len(body.input) - 1, 1)
    return trips.get(id(body), 1) * sum(_bytes(scope.get(v.name)) for v in list(body.output)[carried:])


def _bytes(known: tuple[int, tuple[int, ...]] | None) -> int:
    return 0 if known is None else (math.prod(known[1]) * _bits(known[0]) + 7) // 8


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    return _bytes((tensor.data_type, tuple(tensor.dims)))


def _bits(elem_type: int) -> int:
    import onnx_ir as ir

    try:
        return int(ir.DataType(elem_type).bitwidth)
    except (ValueError, TypeError):  # unknown, or strings, whose size nobody knows
        return 8


def _human(size: int) -> str:
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 10**6 else f"over 1e{len(str(size)) - 1} bytes"
