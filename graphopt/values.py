"""What a file and onnx's shape inference say of each value: its type and shape, scope by scope. Unknown is None."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import onnx

from graphopt.model import graphs
from graphopt.propagation import Types, complete, inferred
from graphopt.weights import BITS, kind_of, text

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Known:
    """``elem_type`` 0: no tensor, or unknown. A dim is a number, a name, or ``?``."""

    kind: str
    elem_type: int
    shape: Dims | None

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The shape, where every dim is a number."""
        found = tuple(d for d in self.shape or () if isinstance(d, int))
        return None if self.shape is None or len(found) < len(self.shape) else found

    @property
    def bytes(self) -> int | None:
        """What the value takes in memory."""
        sizes, bits = self.sizes, BITS.get(self.elem_type)
        return None if sizes is None or bits is None else (math.prod(sizes) * bits + 7) // 8

    def __str__(self) -> str:
        return self.kind + ("[...]" if self.shape is None else f"[{', '.join(map(str, self.shape))}]")


def known(kind: onnx.TypeProto) -> Known:
    """What a type in the file says."""
    which = kind.WhichOneof("value")
    if which not in ("tensor_type", "sparse_tensor_type"):
        return Known((which or "unknown").removesuffix("_type"), 0, None)
    tensor = getattr(kind, which)
    name = kind_of(tensor.elem_type) if tensor.elem_type else "unknown"
    if not tensor.HasField("shape"):
        return Known(name, tensor.elem_type, None)
    return Known(name, tensor.elem_type, tuple(_dim(d) for d in tensor.shape.dim))


def _dim(dim: Any) -> int | str:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return text(dim.dim_param) or "?"


Scope = Mapping[str, Known]


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs a node holds."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


class Values:
    """Types and shapes of a model's values: ``scopes[i]`` for the i-th graph of ``model.graphs``, outer values seen.

    ``dims`` gives the symbolic dims sizes (the others count as 1); None leaves them symbolic.
    """

    def __init__(self, proto: onnx.ModelProto, dims: Mapping[str, int] | None = None) -> None:
        self.proto = proto
        stated = _scopes(proto)
        if dims is not None:
            stated = [{name: _sized(k, dims) for name, k in scope.items()} for scope in stated]
        inferred = _scopes(_inferred(proto, dims))
        self._parents = _parents(proto)
        local = [_merged(a, b) for a, b in zip(inferred, stated, strict=True)]
        if dims is not None:
            _completed(proto, local)
        self.scopes: list[Scope] = []
        for index in range(len(local)):
            chain, at = [], index
            while at >= 0:
                chain.append(local[at])
                at = self._parents[at]
            self.scopes.append(ChainMap(*chain))


def _completed(proto: onnx.ModelProto, scopes: list[dict[str, Known]]) -> None:
    """Add the shapes that hang on data."""
    types: list[Types] = [
        {name: (k.elem_type, sizes) for name, k in scope.items() if (sizes := k.sizes) is not None} for scope in scopes
    ]
    before = [len(one) for one in types]
    kept = list(graphs(proto))  # held, so that the same body is the same object
    complete(proto, kept, types)
    for scope, one, count in zip(scopes, types, before, strict=True):
        for name, (elem_type, shape) in islice(one.items(), count, None):
            scope[name] = Known(kind_of(elem_type), elem_type, shape)


def _merged(inferred: dict[str, Known], stated: dict[str, Known]) -> dict[str, Known]:
    """What inference found, and where it found no complete shape, what the file says."""
    merged = {**stated, **inferred}
    for name, value in stated.items():
        other = inferred.get(name)
        if other is not None and other.sizes is None and value.shape is not None and "?" not in value.shape:
            merged[name] = value
    return merged


def _sized(value: Known, dims: Mapping[str, int]) -> Known:
    if value.shape is None:
        return value
    shape = tuple(
        d if isinstance(d, int) else dims.get(d, 1 if d.isidentifier() else d)  # of "2*batch" nothing is guessed
        for d in value.shape
    )
    return Known(value.kind, value.elem_type, shape)


def _scopes(proto: onnx.ModelProto) -> list[dict[str, Known]]:
    found = []
    for graph in graphs(proto):
        scope = {text(v.name): known(v.type) for v in (*graph.input, *graph.value_info, *graph.output)}
        for t in graph.initializer:
            scope[text(t.name)] = Known(kind_of(t.data_type), t.data_type, tuple(t.dims))
        for s in graph.sparse_initializer:
            scope[text(s.values.name)] = Known(kind_of(s.values.data_type), s.values.data_type, tuple(s.dims))
        found.append(scope)
    return found


def _parents(proto: onnx.ModelProto) -> list[int]:
    """For each graph, the number of the one around it; -1: none."""
    found = list(graphs(proto))
    owner = {id(body): index for index, graph in enumerate(found) for node in graph.node for body in bodies(node)}
    # The list keeps the messages alive, so that the same body is the same object.
    return [owner.get(id(graph), -1) for graph in found]


def _inferred(proto: onnx.ModelProto, dims: Mapping[str, int] | None) -> onnx.ModelProto:
    """A copy with what inference adds. Never raises: inference is a hint."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    if dims is not None:
        for value in fixed.graph.input:
            for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
                if not dim.HasField("dim_value") or dim.dim_value < 0:
                    dim.dim_value = dims.get(dim.dim_param, 1)
        del fixed.graph.value_info[:]  # shapes stated for symbolic inputs would stand in the way
        for output in fixed.graph.output:
            if output.type.HasField("tensor_type"):
                output.type.tensor_type.ClearField("shape")
    try:
        return inferred(fixed)
    except Exception:  # see above
        return fixed
