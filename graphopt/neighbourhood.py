"""One node and what stands around it: where its inputs come from, its attributes, who reads its outputs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import onnx

from graphopt.errors import InputError
from graphopt.external import shown
from graphopt.lifetimes import free
from graphopt.model import graphs
from graphopt.scopes import scope
from graphopt.values import Known, Scope, Values
from graphopt.weights import kind_of, text
from graphopt.workload import label, node_macs, operator

_LONGEST = 120
_SEVERAL = 8


def neighbourhood(values: Values, sized: Values, name: str) -> list[dict[str, Any]]:
    """The node ``name`` (or that makes the value ``name``), each one where several bear the name.

    The name of an input or initializer gives that value, with ``op_type`` None.

    Raises:
        InputError: there is none; names that look like it are said.
    """
    found: list[dict[str, Any]] = []
    all_graphs = list(graphs(values.proto))
    named = any(text(n.name) == name for g in all_graphs for n in g.node)
    for index, graph in enumerate(all_graphs):
        chosen = [n for n in graph.node if _is(n, name, named)]
        stored = not named and name in _stored(graph)
        if chosen or stored:
            around = _Around(graph, values.scopes[index], sized.scopes[index], index)
            found += [around.node(n) for n in chosen]
            if stored:
                found.append(around.value(name))
    if not found:
        raise InputError(_unknown(all_graphs, name))
    return found


def _is(node: onnx.NodeProto, name: str, named: bool) -> bool:
    return text(node.name) == name if named else name in map(text, node.output) or label(node) == name


def _stored(graph: onnx.GraphProto) -> dict[str, str]:
    """Values that no node makes -> what they are."""
    found = {text(v.name): "input" for v in graph.input}
    found.update((text(s.values.name), "sparse initializer") for s in graph.sparse_initializer)
    found.update((text(t.name), "initializer") for t in graph.initializer)
    return found


def _unknown(all_graphs: Sequence[onnx.GraphProto], name: str) -> str:
    names: dict[str, None] = {}
    for graph in all_graphs:
        for node in graph.node:
            names.update(dict.fromkeys(text(n) for n in (node.name, *node.output) if n))
        names.update(dict.fromkeys(_stored(graph)))
    wanted = name.lower()
    near = [n for n in names if n.lower() == wanted]
    near += [n for n in names if n.lower().endswith(wanted) and n not in near][:3]
    if not near and wanted:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if not near and len(wanted) > 2:
        near = [n for n in names if wanted in n.lower()][:3]
    hint = " or ".join(f"'{shown(n)}'" for n in near[:3])
    advice = f"did you mean {hint}?" if hint else "graphopt inspect --tree shows what there is"
    return f"the model has no node or value '{shown(name)}'; {advice}"


class _Around:
    """A graph in which neighbours are looked up."""

    def __init__(self, graph: onnx.GraphProto, scope: Scope, sized: Scope, number: int) -> None:
        self._scope, self._sized, self._number = scope, sized, number
        self._stored = _stored(graph)
        self._outputs = {text(v.name) for v in graph.output}
        self._makers = {text(name): node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in free(node):
                self._readers.setdefault(text(name), []).append(node)

    def node(self, node: onnx.NodeProto) -> dict[str, Any]:
        """All about a node."""
        return {
            "name": label(node),
            "op_type": operator(node),
            "graph": self._number,
            "scope": list(scope(node)),
            "inputs": [self._input(text(name)) for name in node.input],
            "captured": [self._input(name) for name in sorted(map(text, free(node) - set(node.input)))],
            "attributes": {text(a.name): attribute_text(a) for a in node.attribute},
            "outputs": [self._output(text(name)) for name in node.output],
            "macs": node_macs(node, self._sized),
            "metadata": {text(p.key): text(p.value) for p in node.metadata_props},
            "doc": text(node.doc_string),
        }

    def value(self, name: str) -> dict[str, Any]:
        """All about a value that no node makes."""
        kind = self._stored[name]
        return {
            "name": name,
            "op_type": None,
            "graph": self._number,
            "scope": [],
            "inputs": [],
            "captured": [],
            "attributes": {},
            "outputs": [{**self._output(name), "from": kind}],
            "macs": None,
            "metadata": {},
            "doc": "",
        }

    def _typed(self, name: str) -> dict[str, Any]:
        known: Known | None = self._scope.get(name)
        return {
            "name": name,
            "type": known.kind if known else "unknown",
            "shape": list(known.shape) if known and known.shape is not None else None,
        }

    def _input(self, name: str) -> dict[str, Any]:
        if not name:
            return {"name": "", "type": "none", "shape": None, "from": "none", "bytes": None}
        maker = self._makers.get(name)
        source = self._stored.get(name, "outer graph") if maker is None else f"{operator(maker)} {label(maker)}"
        known: Known | None = self._scope.get(name)
        weigh = known is not None and "initializer" in source
        return {**self._typed(name), "from": source, "bytes": known.bytes if weigh and known else None}

    def _output(self, name: str) -> dict[str, Any]:
        readers = [f"{operator(n)} {label(n)}" for n in self._readers.get(name, ())]
        return {**self._typed(name), "readers": readers, "is_output": name in self._outputs}


def attribute_text(attribute: onnx.AttributeProto) -> str:
    """An attribute's value as one short line."""
    if attribute.ref_attr_name:
        return f"the function's {text(attribute.ref_attr_name)}"
    return _cut(_value(attribute))


def _value(attribute: onnx.AttributeProto) -> str:
    kinds = onnx.AttributeProto
    if attribute.type == kinds.FLOAT:
        return f"{attribute.f:.7g}"
    if attribute.type == kinds.INT:
        return str(attribute.i)
    if attribute.type == kinds.STRING:
        return repr(attribute.s.decode("utf-8", "backslashreplace"))
    if attribute.type == kinds.TENSOR:
        return _tensor(attribute.t)
    if attribute.type == kinds.GRAPH:
        return f"body of {len(attribute.g.node)} nodes"
    if attribute.type == kinds.FLOATS:
        return _many([f"{v:.7g}" for v in attribute.floats[: _SEVERAL + 1]], len(attribute.floats))
    if attribute.type == kinds.INTS:
        return _many([str(v) for v in attribute.ints[: _SEVERAL + 1]], len(attribute.ints))
    if attribute.type == kinds.STRINGS:
        some = [repr(v.decode("utf-8", "backslashreplace")) for v in attribute.strings[: _SEVERAL + 1]]
        return _many(some, len(attribute.strings))
    if attribute.type == kinds.TENSORS:
        return _many([_tensor(t) for t in attribute.tensors[: _SEVERAL + 1]], len(attribute.tensors))
    if attribute.type == kinds.GRAPHS:
        return f"{len(attribute.graphs)} bodies"
    names: dict[int, str] = {number: name for name, number in kinds.AttributeType.items()}
    return names.get(attribute.type, "unknown").lower().replace("_", " ")


def _tensor(tensor: onnx.TensorProto) -> str:
    dims = ", ".join(map(str, tensor.dims))
    head = f"{kind_of(tensor.data_type)}[{dims}]"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return head
    return " ".join([head, *_values(tensor)])


def _values(tensor: onnx.TensorProto) -> Iterator[str]:
    """The values of a small tensor, where they are there and onnx can read them."""
    count = 1
    for dim in tensor.dims:
        count *= dim
    if 0 < count <= _SEVERAL:
        try:
            array = onnx.numpy_helper.to_array(tensor).reshape(-1)
        except Exception:  # a type or a form this onnx cannot read
            return
        yield ", ".join(f"{v:.7g}" if array.dtype.kind == "f" else str(v) for v in array.tolist())


def _many(some: list[str], count: int) -> str:
    return ", ".join(some[:_SEVERAL]) + (f", ... ({count})" if count > _SEVERAL else "")


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST else value[: _LONGEST - 3] + "..."
