"""The modules a model was exported from, as a tree: from what exporters leave in nodes, or from nodes' names."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from graphopt.weights import text
from graphopt.workload import Work

_DEEPEST = 64


def scope(node: onnx.NodeProto) -> tuple[str, ...]:
    """The path of the module a node comes from; empty where nothing says."""
    said = {text(p.key): text(p.value) for p in node.metadata_props}
    if "pkg.torch.onnx.name_scopes" in said:
        return _name_scopes(said["pkg.torch.onnx.name_scopes"])
    if "namespace" in said:
        return _namespace(said["namespace"])
    name = text(node.name or next(iter(node.output), ""))
    if "/" in name:
        return tuple(part for part in name.split("/")[:-1] if part)
    parts = name.split(".")
    return tuple(parts[:-1]) if len(parts) > 1 and all(parts) else ()


def _name_scopes(value: str) -> tuple[str, ...]:
    """``['', 'encoder', 'encoder.layer.0', 'linear']``, each inside the one before, the last the node's own."""
    try:
        names = [str(part) for part in ast.literal_eval(value)][:-1]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return ()
    path: list[str] = []
    before = ""
    for name in names:
        if name:
            path.append(name[len(before) + 1 :] if before and name.startswith(before + ".") else name)
            before = name
    return tuple(path)


def _namespace(value: str) -> tuple[str, ...]:
    """``: Model/encoder: Encoder/encoder.layer.0: Layer/linear: aten.linear``, likewise."""
    names = [part.split(":")[0].strip() for part in value.split("/")]
    return _name_scopes(repr(names)) if names else ()


@dataclass
class Scope:
    """A module: what stands in it, inner modules included."""

    name: str
    nodes: int = 0
    macs: int | None = None
    unknown: int = 0
    parameters: int = 0
    weight_bytes: int = 0
    operators: dict[str, int] = field(default_factory=dict)
    children: dict[str, Scope] = field(default_factory=dict)

    def add(self, work: Work) -> None:
        """Count a node."""
        self.nodes += 1
        self.parameters += work.parameters
        self.weight_bytes += work.weight_bytes
        self.unknown += work.macs is None
        if work.macs is not None:
            self.macs = (self.macs or 0) + work.macs

    def as_dict(self) -> dict[str, Any]:
        """For the report; ``operators`` are those right here."""
        return {
            "name": self.name,
            "nodes": self.nodes,
            "macs": self.macs,
            "macs_unknown_nodes": self.unknown,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "operators": self.operators,
            "children": [child.as_dict() for child in self.children.values()],
        }


def tree(works: Sequence[Work]) -> dict[str, Any]:
    """The root, its name empty; modules in order of their first node."""
    root = Scope("")
    for work in works:
        at = root
        at.add(work)
        for part in scope(work.node)[:_DEEPEST]:
            at = at.children.setdefault(part, Scope(part))
            at.add(work)
        op_type = text(work.node.op_type)
        at.operators[op_type] = at.operators.get(op_type, 0) + 1
    return root.as_dict()
