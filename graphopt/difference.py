"""One difference between two models, and how the parts of a model are put into words for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from graphopt.align import Pairing
from graphopt.external import shown
from graphopt.numbering import Side, View, domain, kind_inside, opsets, tensors_of
from graphopt.tensors import compare_tensors, element_type, type_name

_LONG = 60

Edit = tuple[str, str | None, str | None]
"""What it was about, before, after; None: there was or is none."""


@dataclass(frozen=True)
class Difference:
    """One thing that changed."""

    section: str
    kind: str
    """"added", "removed" or "changed"."""
    name: str
    """What A calls it; B where it was added."""
    type: str = ""
    """The operator, or the type of a weight."""
    scope: str = ""
    """The body or function it is in; empty: the main graph."""
    edits: tuple[Edit, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    """Numbers, and what it is called in B."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        edits = [{"what": what, "before": before, "after": after} for what, before, after in self.edits]
        head = {"kind": self.kind, "name": self.name, "type": self.type or None, "scope": self.scope or None}
        return {**head, "changes": edits, **self.data}


def kind_of(edit: Edit) -> str:
    """Whether something came, went or changed."""
    return "added" if edit[1] is None else "removed" if edit[2] is None else "changed"


def table(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Edit]:
    """The entries that differ; ``what`` goes before their keys."""
    found: list[Edit] = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            values = [None if side.get(key) is None else cut(str(side[key])) for side in (before, after)]
            found.append((f"{what} {key}".strip(), values[0], values[1]))
    return found


def cut(text: str) -> str:
    """A stranger's text, in one line of bearable length."""
    text = shown(text)
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def label(node: onnx.NodeProto) -> str:
    """What to call a node: its name, or its first output."""
    return node.name or next((name for name in node.output if name), f"unnamed {node.op_type}")


def operator(node: onnx.NodeProto) -> str:
    """``Conv``, ``com.microsoft::Gelu``."""
    where = domain(node.domain)
    return f"{where}::{node.op_type}" if where else node.op_type


def described(view: View, name: str) -> str | None:
    """A value as something a node reads: its name, and who makes it."""
    if not name:
        return None
    if name in view.weights:
        return f"{name} (weight)"
    producer = view.producer.get(name)
    return name if producer is None else f"{name} ({operator(view.nodes[producer[0]])})"


def neighbours(view: View, index: int) -> dict[str, Any]:
    """Between what an added or removed node stands."""
    node = view.nodes[index]
    users = [view.nodes[user] for name in node.output for user, _ in view.uses.get(name, ())]
    used_by = [f"{operator(user)} {label(user)}" for user in users]
    used_by += [f"output {name}" for name in node.output if name in view.outputs]
    return {"inputs": list(node.input), "outputs": list(node.output), "used_by": list(dict.fromkeys(used_by))}


def describe(value: onnx.TypeProto) -> str:
    """``float32[batch, 3]``; ``sequence(int64[?])``."""
    kind = value.WhichOneof("value")
    if kind is None:
        return "untyped"
    inner: Any = getattr(value, kind)
    if kind in ("tensor_type", "sparse_tensor_type"):
        dims = [d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in inner.shape.dim]
        shape = f"[{', '.join(dims)}]" if inner.HasField("shape") else "[...]"
        return f"{'sparse ' if kind.startswith('sparse') else ''}{element_type(inner.elem_type)}{shape}"
    if kind == "map_type":
        return f"map({element_type(inner.key_type)}, {describe(inner.value_type)})"
    if kind in ("sequence_type", "optional_type"):
        return f"{kind.removesuffix('_type')}({describe(inner.elem_type)})"
    return str(kind).removesuffix("_type")


def types(a: onnx.ValueInfoProto, b: onnx.ValueInfoProto) -> list[Edit]:
    """Whether two values are declared to be different."""
    before, after = describe(a.type), describe(b.type)
    if before != after:
        return [("type", before, after)]
    if a.type.SerializeToString(deterministic=True) != b.type.SerializeToString(deterministic=True):
        return [("denotation of the type", denotations(a.type), denotations(b.type))]
    return []


def denotations(value: onnx.TypeProto) -> str:
    """What the type and its dims are said to stand for."""
    dims: Any = value.tensor_type.shape.dim if value.HasField("tensor_type") else ()
    return cut(", ".join(shown(text) for text in (value.denotation, *(d.denotation for d in dims)) if text) or "none")


def attribute_text(side: Side, attribute: onnx.AttributeProto) -> str:
    """An attribute's value."""
    if attribute.ref_attr_name:
        return f"attribute {attribute.ref_attr_name} of the function"
    if attribute.HasField("g") or attribute.graphs:
        return "a graph" if attribute.HasField("g") else f"{len(attribute.graphs)} graphs"
    tensors = list(tensors_of(attribute))
    if tensors:
        return ", ".join(_tensor_text(side, tensor) for tensor in tensors)
    if not attribute.type:
        typed = onnx.AttributeProto()
        typed.CopyFrom(attribute)
        typed.type = kind_inside(attribute)
        attribute = typed
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, (bytes, str, int, float, onnx.TypeProto)):
        return _value_text(value)
    return f"[{', '.join(_value_text(one) for one in value)}]"


def _value_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, onnx.TypeProto):
        return describe(value)
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _tensor_text(side: Side, tensor: Any) -> str:
    name = type_name(tensor)
    if isinstance(tensor, onnx.TensorProto) and len(tensor.dims) <= 1 and sum(tensor.dims) <= 4:
        return f"{name} {side.read(tensor).numpy().tolist()}"
    return name


def attribute_edits(a: View, x: onnx.NodeProto, b: View, y: onnx.NodeProto) -> list[Edit]:
    """Attributes that differ, defaults of the operator set filled in on both sides."""
    found: list[Edit] = []
    before, after = a.side.attributes(x, a.opsets), b.side.attributes(y, b.opsets)
    given = {attribute.name for attribute in x.attribute}, {attribute.name for attribute in y.attribute}
    for name in sorted({*before, *after}):
        p, q = before.get(name), after.get(name)
        if p is not None and q is not None and a.side.content(p) == b.side.content(q):
            continue
        texts = [
            None if one is None else cut(attribute_text(side, one)) + ("" if name in own else " (default)")
            for side, one, own in ((a.side, p, given[0]), (b.side, q, given[1]))
        ]
        if texts[0] == texts[1] and p is not None and q is not None:
            texts[1] = f"{texts[1]}; {_apart(a.side, p, b.side, q)}"
        found.append((name, texts[0], texts[1]))
    return found


def _apart(a: Side, x: onnx.AttributeProto, b: Side, y: onnx.AttributeProto) -> str:
    """What tells two attributes apart whose texts are equal."""
    pairs = zip(tensors_of(x), tensors_of(y), strict=False)
    apart = [distance_text(compare_tensors(a, p, b, q)) for p, q in pairs if a.sparse(p, 0) != b.sparse(q, 0)]
    if apart:
        return "; ".join(apart)
    if x.floats or y.floats:
        return f"{sum(p != q for p, q in zip(x.floats, y.floats, strict=False))} numbers differ"
    return "differs further on"


def distance_text(numbers: Mapping[str, Any]) -> str:
    """``1 of 64 elements, max abs 0.001``."""
    if numbers["elements_differ"] is None:
        return "of another form"
    apart = "" if numbers["max_abs"] is None else f", max abs {numbers['max_abs']:.3g}"
    return f"{numbers['elements_differ']} of {numbers['elements']} elements{apart}"


def text_edits(a: Any, b: Any) -> list[Edit]:
    """Doc strings and metadata properties of two like messages."""
    found = table("", {"doc string": a.doc_string or None}, {"doc string": b.doc_string or None})
    found += table("metadata", *({p.key: p.value for p in m.metadata_props} for m in (a, b)))
    if isinstance(a, onnx.NodeProto):
        found += table("doc string of", *({x.name: x.doc_string for x in m.attribute if x.doc_string} for m in (a, b)))
    return found


_ELSEWHERE = {"graph", "functions", "metadata_props", "opset_import", "doc_string"}
_WORDS = {"ir_version": "IR version", "training_info": "training information", "configuration": "device configuration"}


def header(a: onnx.ModelProto, b: onnx.ModelProto) -> list[Edit]:
    """IR version, operator sets, producer, and every other field of the model that is not looked at elsewhere."""
    found: list[Edit] = []
    for one in onnx.ModelProto.DESCRIPTOR.fields:
        x, y = getattr(a, one.name), getattr(b, one.name)
        if one.name in _ELSEWHERE:
            continue
        word = _WORDS.get(one.name, one.name.replace("_", " "))
        if isinstance(x, (int, str, bytes)):
            if x != y:
                found.append((word, cut(str(x)) if x else None, cut(str(y)) if y else None))
        elif [m.SerializeToString(deterministic=True) for m in x] != [
            m.SerializeToString(deterministic=True) for m in y
        ]:
            found.append((word, f"{len(x)} entries" if len(x) else None, f"{len(y)} other entries" if len(y) else None))
    return found + table("opset", *({name or "ai.onnx": n for name, n in opsets(m).items()} for m in (a, b)))


class Wiring:
    """Whether two values that corresponding nodes read are one and the same."""

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        self._known: dict[tuple[int, str], frozenset[str]] = {}

    def same(self, x: str, y: str) -> bool:
        """Aligned; or computed alike where one of two equal things was dropped or one was doubled."""
        if not x or not y or self.pairing.values.get(x) == y:
            return bool(x) == bool(y)
        if x in self.pairing.values and y in self.pairing.taken:
            return False
        return self.pairing.ups_a[0][1].get(x) == self.pairing.ups_b[0][1].get(y)

    def implied(self, x: str, y: str) -> bool:
        """Whether ``x`` became ``y`` only because a node between was added or removed, which is listed anyway."""
        p = self.pairing
        new_x, new_y = bool(x) and x not in p.values, bool(y) and y not in p.taken
        if not x or not y or not (new_x or new_y):
            return False
        if new_x and new_y:  # both were made by what is listed
            return True
        above = self._above(p.a, x), self._above(p.b, y)
        mine = {p.values.get(name) for name in above[0]}
        return bool(mine & above[1]) or (new_x and x in p.a.weights) or (new_y and y in p.b.weights)

    def _above(self, view: View, name: str) -> frozenset[str]:
        """The nearest values with a counterpart on the way up from ``name``."""
        p = self.pairing
        key = (view is p.a, name)
        if key not in self._known:
            done = p.values if view is p.a else p.taken
            found, seen, stack = set[str](), {name}, [name]
            while stack:
                current = stack.pop()
                producer = view.producer.get(current)
                if current in done or producer is None:
                    found.add(current)
                    continue
                new = [n for n in view.nodes[producer[0]].input if n and n not in seen]
                seen.update(new)
                stack += new
            self._known[key] = frozenset(found)
        return self._known[key]
