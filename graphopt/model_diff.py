"""What changed between two models: aligned by structure, so that names and order are not a change.

:class:`Diff` holds one :class:`Difference` for each thing that changed; ``as_dict`` is what ``graphopt diff --json``
prints. Where nothing is listed, the models are the same graph with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from graphopt.align import Pairing, pair_body, pair_main, pair_names, sides
from graphopt.difference import (
    Difference,
    Edit,
    Wiring,
    attribute_edits,
    attribute_text,
    cut,
    describe,
    described,
    distance_text,
    header,
    kind_of,
    label,
    neighbours,
    operator,
    table,
    text_edits,
    types,
)
from graphopt.model import ModelLike
from graphopt.numbering import Side, View, Weight, opsets
from graphopt.tensors import compare_tensors, type_name

SCHEMA_VERSION = 1
SECTIONS = ("model", "interface", "nodes", "weights", "declared", "functions", "texts", "names")
"""What a difference may be in, in the order in which they are printed."""


@dataclass
class Diff:
    """Everything that changed from A to B."""

    models: list[dict[str, Any]]
    found: list[Difference]
    aligned: dict[str, int]
    """Nodes and weights that correspond, in all graphs."""
    renamed: dict[str, int]
    """Nodes, inner values and graphs that correspond and have another name."""

    @property
    def differences(self) -> int:
        """How many there are; 0 means the same graph and the same weights."""
        return len(self.found)

    def section(self, name: str) -> list[Difference]:
        """Those of one of :data:`SECTIONS`."""
        return [one for one in self.found if one.section == name]

    def as_dict(self) -> dict[str, Any]:
        """The object that ``graphopt diff --json`` prints (docs/diff.md)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verb": "diff",
            "models": self.models,
            "differences": self.differences,
            "aligned": self.aligned,
            "renamed": self.renamed,
            **{name: [one.as_dict() for one in self.section(name)] for name in SECTIONS},
        }


def diff(a: ModelLike, b: ModelLike, *, names: bool = False, external_roots: Sequence[str | Path] = ()) -> Diff:
    """What changed from A to B; neither is changed, nothing is run.

    Names of nodes and of inner values are counted, and are differences only with ``names``. External weights are read
    only where the two models do not name the same bytes of the same file.

    Raises:
        InputError: a file cannot be read.
        ModelError: it is no ONNX model, or weights that have to be compared are missing.
    """
    first, second = sides(a, b, external_roots)
    work = _Work(names)
    about = work.model(first, second)
    for one, source in zip(about, (a, b), strict=True):
        one["path"] = str(source) if isinstance(source, (str, Path)) and str(source) != "-" else None
    return Diff(about, work.found, work.aligned, work.renamed)


class _Work:
    """Goes through both models and notes what differs."""

    def __init__(self, names: bool) -> None:
        self.names = names
        self.found: list[Difference] = []
        self.aligned = {"nodes": 0, "weights": 0}
        self.renamed = {"nodes": 0, "values": 0, "graphs": 0}

    def note(self, section: str, kind: str, name: str, edits: Iterable[Edit] = (), **more: Any) -> None:
        """One difference; a change of nothing is none."""
        listed = tuple(edits)
        if kind != "changed" or listed:
            self.found.append(Difference(section, kind, name, edits=listed, **more))

    def texts(self, name: str, scope: str, a: Any, b: Any) -> None:
        """Doc strings and metadata of one thing."""
        self.note("texts", "changed", name, text_edits(a, b), scope=scope)

    def model(self, a: Side, b: Side) -> list[dict[str, Any]]:
        for edit in header(a.proto, b.proto):
            self.note("model", kind_of(edit), edit[0], [edit])
        for edit in text_edits(a.proto, b.proto):  # each key for itself: this is what people look for
            self.note("texts", kind_of(edit), f"model {edit[0]}", [edit])
        self.interface(a.proto.graph, b.proto.graph)
        views = View(a, a.proto.graph, opsets(a.proto)), View(b, b.proto.graph, opsets(b.proto))
        self.graph(pair_main(*views), "")
        for key in dict.fromkeys([*a.functions, *b.functions]):
            self.function(a, b, key)
        return [{"path": None, "nodes": len(view.nodes), "weights": len(view.weights)} for view in views]

    def interface(self, a: onnx.GraphProto, b: onnx.GraphProto) -> None:
        """The main graph's inputs and outputs, as callers see them."""
        for what, mine, theirs in (("input", a.input, b.input), ("output", a.output, b.output)):
            before, after = {v.name: v for v in mine}, {v.name: v for v in theirs}
            pairs = dict(pair_names(list(before), list(after)))
            for x, value in before.items():
                if x not in pairs:
                    self.note("interface", "removed", f"{what} {x}", type=describe(value.type))
                    continue
                y = pairs[x]
                renamed: list[Edit] = [] if x == y else [("name", x, y)]
                self.note("interface", "changed", f"{what} {x}", renamed + types(value, after[y]))
                self.texts(f"{what} {x}", "", value, after[y])
            used = set(pairs.values())
            for y, value in after.items():
                if y not in used:
                    self.note("interface", "added", f"{what} {y}", type=describe(value.type))
            position = {name: k for k, name in enumerate(after)}
            order = [position[pairs[x]] for x in before if x in pairs]
            if order != sorted(order):
                self.note(
                    "interface", "changed", f"{what}s", [("order", cut(", ".join(before)), cut(", ".join(after)))]
                )

    def function(self, a: Side, b: Side, key: tuple[str, str, str]) -> None:
        name = "::".join(part for part in key if part)
        if key not in a.functions or key not in b.functions:
            self.note("functions", "added" if key in b.functions else "removed", name)
            return
        mine, theirs = a.functions[key], b.functions[key]
        attributes: list[dict[str, str]] = []
        for side, function in ((a, mine), (b, theirs)):
            given = {x.name: attribute_text(side, x) for x in function.attribute_proto}
            attributes.append({**dict.fromkeys(function.attribute, "required"), **given})
        edits = table("opset", opsets(mine), opsets(theirs)) + table("attribute", *attributes)
        self.note("functions", "changed", name, edits + _counts(mine, theirs))
        self.graph(pair_body(View(a, mine, opsets(mine)), View(b, theirs, opsets(theirs))), f"function {name}")

    def graph(self, pairing: Pairing, scope: str) -> None:
        """Everything in one graph, and in the bodies of its nodes."""
        a, b, wiring = pairing.a, pairing.b, Wiring(pairing)
        self.texts("graph", scope, a.graph, b.graph)
        for i, j in sorted(pairing.nodes.items()):
            self.node(wiring, i, j, scope)
        for view, done, kind in ((a, pairing.nodes, "removed"), (b, pairing.back, "added")):
            for index, node in enumerate(view.nodes):
                if index not in done:
                    about = neighbours(view, index)
                    self.note("nodes", kind, label(node), type=operator(node), scope=scope, data=about)
        for x, y in pairing.outputs:
            if not wiring.same(x, y) and not wiring.implied(x, y):
                edit = ("made by", described(a, x), described(b, y))
                self.note("interface", "changed", f"output {x}", [edit], scope=scope)
        self.weights(pairing, scope)
        self.declared(pairing, scope)
        self.other_names(pairing, scope)

    def node(self, wiring: Wiring, i: int, j: int, scope: str) -> None:
        pairing = wiring.pairing
        a, b = pairing.a, pairing.b
        mine, theirs = a.nodes[i], b.nodes[j]
        self.aligned["nodes"] += 1
        edits: list[Edit] = []
        if a.operator(i) != b.operator(j):
            edits.append(("operator", operator(mine), operator(theirs)))
        else:
            edits += attribute_edits(a, mine, b, theirs)
        for slot in range(max(len(mine.input), len(theirs.input))):
            x, y = (node.input[slot] if slot < len(node.input) else "" for node in (mine, theirs))
            if not wiring.same(x, y) and not wiring.implied(x, y):
                edits.append((f"input {slot}", described(a, x), described(b, y)))
        if [bool(name) for name in mine.output] != [bool(name) for name in theirs.output]:
            edits.append(("outputs", ", ".join(mine.output), ", ".join(theirs.output)))
        devices = [[d.SerializeToString() for d in getattr(n, "device_configurations", ())] for n in (mine, theirs)]
        if devices[0] != devices[1]:
            edits.append(("device configurations", str(len(devices[0])), str(len(devices[1]))))
        about = {"name_b": label(theirs)}
        self.note("nodes", "changed", label(mine), edits, type=operator(mine), scope=scope, data=about)
        self.texts(f"node {label(mine)}", scope, mine, theirs)
        bodies = dict(a.bodies[i]), dict(b.bodies[j])
        for path in bodies[0]:
            if path in bodies[1]:
                inner = f"{scope}/{label(mine)}.{path}".lstrip("/")
                self.body(bodies[0][path], bodies[1][path], pairing, inner)

    def body(self, a: View, b: View, outside: Pairing, scope: str) -> None:
        pairing = pair_body(a, b, outside.values)
        self.note("interface", "changed", "body", _counts(a.graph, b.graph), scope=scope)
        for what, mine, theirs in (("input", a.graph.input, b.graph.input), ("output", a.graph.output, b.graph.output)):
            for x, y in zip(mine, theirs, strict=False):
                self.note("declared", "changed", f"{what} {x.name}", types(x, y), scope=scope)
                self.texts(f"{what} {x.name}", scope, x, y)
        self.graph(pairing, scope)

    def weights(self, pairing: Pairing, scope: str) -> None:
        a, b = pairing.a, pairing.b
        paired = pairing.weights
        for x, mine in a.weights.items():
            if x not in paired:
                self.note("weights", "removed", x, type=type_name(mine.tensor), scope=scope, data=_copied(a, x, paired))
                continue
            self.aligned["weights"] += 1
            theirs = b.weights[paired[x]]
            edits, numbers = _weight_edits(a.side, mine, b.side, theirs)
            about = {"name_b": theirs.name, **numbers}
            self.note("weights", "changed", x, edits, type=type_name(mine.tensor), scope=scope, data=about)
            for p, q in _holders(a, mine, b, theirs):
                self.texts(f"weight {x}", scope, p, q)
        used = {y: x for x, y in paired.items()}
        for y, theirs in b.weights.items():
            if y not in used:
                self.note("weights", "added", y, type=type_name(theirs.tensor), scope=scope, data=_copied(b, y, used))

    def declared(self, pairing: Pairing, scope: str) -> None:
        """Types and shapes stated for inner values, and what they are annotated with for quantization."""
        before, after = ({v.name: v for v in view.graph.value_info} for view in (pairing.a, pairing.b))
        for x, y in pairing.values.items():
            p, q = _stated(pairing.a, before, x), _stated(pairing.b, after, y)
            if p is not None and q is not None:
                self.note("declared", "changed", x, types(p, q), scope=scope)
                self.texts(f"value {x}", scope, p, q)
            elif p is not None or q is not None:
                known = p if p is not None else q
                assert known is not None
                self.note("declared", "added" if p is None else "removed", x, type=describe(known.type), scope=scope)
        if isinstance(pairing.a.graph, onnx.GraphProto):
            notes = [_annotations(pairing.a.graph, pairing.values), _annotations(pairing.b.graph, {})]
            for edit in table("quantization of", *notes):
                self.note("declared", kind_of(edit), edit[0], [edit], scope=scope)

    def other_names(self, pairing: Pairing, scope: str) -> None:
        """Count what is only called otherwise; with ``names`` it is a difference."""
        fixed = set() if scope else {v.name for v in (*pairing.a.graph.input, *pairing.a.graph.output)}
        nodes = [(pairing.a.nodes[i].name, pairing.b.nodes[j].name) for i, j in sorted(pairing.nodes.items())]
        for x, y in pairing.weights.items():
            p, q = pairing.a.weights[x].node, pairing.b.weights[y].node
            if p is not None and q is not None:
                nodes.append((pairing.a.graph.node[p].name, pairing.b.graph.node[q].name))
        captured = {x for x, _ in pairing.captured}
        values = [pair for pair in pairing.values.items() if pair[0] not in captured and pair[0] not in fixed]
        for what, pairs in (
            ("nodes", nodes),
            ("values", values),
            ("graphs", [(pairing.a.graph.name, pairing.b.graph.name)]),
        ):
            for x, y in pairs:
                if x != y:
                    self.renamed[what] += 1
                    if self.names:
                        edit = ("name", x or None, y or None)
                        self.note("names", "changed", f"{what[:-1]} {x or y}", [edit], scope=scope)


def _counts(a: Any, b: Any) -> list[Edit]:
    """Whether a body or function takes or gives more or fewer values."""
    return [
        (f"number of {what}s", str(len(getattr(a, what))), str(len(getattr(b, what))))
        for what in ("input", "output")
        if len(getattr(a, what)) != len(getattr(b, what))
    ]


def _weight_edits(a: Side, x: Weight, b: Side, y: Weight) -> tuple[list[Edit], dict[str, Any]]:
    edits: list[Edit] = [] if x.stored == y.stored else [("stored as", x.stored, y.stored)]
    if a.weight(x) == b.weight(y):
        return edits, {}
    numbers = compare_tensors(a, x.tensor, b, y.tensor)
    before, after = type_name(x.tensor), type_name(y.tensor)
    if before != after:
        edits.append(("type", before, after))
    if numbers["elements_differ"] or before == after:
        edits.append(("elements", None, distance_text(numbers)))
    return edits, numbers


def _copied(view: View, name: str, paired: dict[str, str]) -> dict[str, Any]:
    """An added or removed weight may only be a copy of one that stays: one that was shared is no longer, or is now."""
    number = view.side.weight(view.weights[name])
    same = (other for other, weight in view.weights.items() if other in paired and view.side.weight(weight) == number)
    return {"copy_of": next(same, None)}


def _holders(a: View, x: Weight, b: View, y: Weight) -> list[tuple[Any, Any]]:
    """What carries the texts of a weight: its tensor, and the Constant node that holds it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(x.tensor, onnx.TensorProto) and isinstance(y.tensor, onnx.TensorProto):
        found.append((x.tensor, y.tensor))
    if x.node is not None and y.node is not None:
        found.append((a.graph.node[x.node], b.graph.node[y.node]))
    return found


def _stated(view: View, infos: dict[str, onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto | None:
    """What the file says of an inner value; of a weight only where it is more than what the weight says itself."""
    info, weight = infos.get(name), view.weights.get(name)
    if info is not None and weight is not None and not info.doc_string and not info.metadata_props:
        return None if describe(info.type) == type_name(weight.tensor) else info
    return info


def _annotations(graph: onnx.GraphProto, names: dict[str, str]) -> dict[str, str]:
    """value -> its quantization parameters, everything by the name that ``names`` gives it."""
    return {
        names.get(one.tensor_name, one.tensor_name): ", ".join(
            sorted(f"{p.key}={names.get(p.value, p.value)}" for p in one.quant_parameter_tensor_names)
        )
        for one in graph.quantization_annotation
    }
