"""What is wrong with a model that was made of another: each finding is a column of the table and a reason."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from graphopt.errors import RuntimeFailure
from graphopt.model import graphs, load, to_bytes, to_proto
from graphopt.session import Session
from graphopt.validation import unstable
from tools.conformance.cases import Feeds, all_nodes

COLUMNS = {
    "crashed": "it raised, refused a valid model, or its process died",
    "hang": "it took more than 20 s of CPU (or 200 s in all) and was stopped",
    "invalid": "onnx's checker accepts the original and not the result",
    "unloadable": "ONNX Runtime runs the original and not the result",
    "wrong": "another result; bit for bit, but for those whose work is arithmetic (1e-4 relative)",
    "interface": "inputs or outputs have other names, order, types, ranks or sizes than were declared",
    "dims": "symbolic dims of inputs or outputs were renamed, merged or replaced",
    "metadata": "metadata or doc strings of the model, the graph or a node that is still there were lost",
    "versions": "IR version changed, or an operator set",
    "overridable": "an initializer that callers may replace (it is an input too) can no longer be replaced",
    "grown": "the file is more than 10 % and 1 kB larger",
    "mutated": "the caller's model was changed",
}
"""The columns that count what is wrong, and what each means."""

Finding = tuple[str, str]


class Reference:
    """The model before: what it says, and what it computes, found out when first asked."""

    def __init__(self, proto: onnx.ModelProto, feeds: Feeds) -> None:
        self.proto = proto
        self.data = serialized(proto)
        self._feeds = feeds
        self._known: dict[tuple[bytes, bool], list[Finding]] = {}

    @cached_property
    def loaded(self) -> tuple[ir.Model, bytes]:
        """As graphopt holds it, and its bytes there: most passes leave most models alone, and need no copy each."""
        model = load(self.proto)
        return model, to_bytes(model)

    @cached_property
    def round_trip(self) -> onnx.ModelProto:
        """What it is when nothing but reading and writing was done to it."""
        return to_proto(self.loaded[0])

    @cached_property
    def valid(self) -> bool:
        """Whether onnx's checker accepts it."""
        return problem(self.proto) is None

    @cached_property
    def ran(self) -> tuple[Feeds, dict[str, Any], set[str]] | None:
        """(inputs, outputs, which of them are random), or None where it does not run."""
        try:
            feeds = {k: numpy_helper.to_array(v) for k, v in self._feeds.items()}
            session = Session(self.proto, optimize=False, threads=1)
            return feeds, session.run(feeds), unstable(session, feeds)
        except (RuntimeFailure, ValueError, TypeError):  # the runtime lacks it, or numpy its type
            return None

    @cached_property
    def _outline(self) -> set[Any]:
        return _outline(self.proto)

    @cached_property
    def half(self) -> bool:
        """Whether it has to be compared loosely; see :func:`in_half_precision`."""
        return in_half_precision(self.proto)

    def changed(self, after: onnx.ModelProto) -> bool:
        """Whether nodes or weights are others, by what they read and make."""
        return _outline(after) != self._outline

    def findings(self, after: onnx.ModelProto, *, rounding: bool = False) -> list[Finding]:
        """All that is wrong with ``after``; several contestants make the same, which is judged once."""
        data = serialized(after)
        key = hashlib.sha256(data).digest(), rounding
        if key not in self._known:
            self._known[key] = [] if data == self.data else list(_findings(self, after, len(data), rounding))
        return self._known[key]


def serialized(proto: onnx.ModelProto) -> bytes:
    """The model's bytes, the same each time."""
    return bytes(proto.SerializeToString(deterministic=True))


def _outline(proto: onnx.ModelProto) -> set[Any]:
    nodes = {(node.op_type, tuple(node.input), tuple(node.output)) for node in all_nodes(proto)}
    return nodes | {tensor.name for graph in graphs(proto) for tensor in graph.initializer}


def problem(proto: onnx.ModelProto) -> str | None:
    """What onnx's checker says against it."""
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # it raises what its C++ throws
        return " ".join(str(error).split())[:200]
    return None


def _findings(before: Reference, after: onnx.ModelProto, size: int, rounding: bool) -> Iterator[Finding]:
    if before.valid and (why := problem(after)) is not None:
        yield "invalid", why
    yield from _numbers(before, after, rounding)
    yield from _interface(before.proto, after)
    yield from _lost_words(before.proto, after)
    yield from _versions(before.proto, after)
    yield from _fixed(before.proto, after)
    if size > 1.1 * len(before.data) and size > len(before.data) + 1024:
        yield "grown", f"{len(before.data)} -> {size} bytes"


def _numbers(before: Reference, after: onnx.ModelProto, rounding: bool) -> Iterator[Finding]:
    if before.ran is None:
        return
    feeds, outputs, random = before.ran
    try:
        got = Session(after, optimize=False, threads=1).run(feeds)
    except RuntimeFailure as error:
        yield "unloadable", str(error)
        return
    declared = {v.name: v.type for v in before.proto.graph.output}
    for value in after.graph.output:
        result = outputs.get(value.name)
        if not isinstance(result, np.ndarray) or _true_of(declared[value.name], result) is False:
            continue
        if not _true_of(value.type, result):
            yield "interface", f"output '{value.name}' is declared with another shape than it has"
    for name, value in outputs.items():
        if name in got and name not in random and not equal(value, got[name], rounding=rounding or before.half):
            yield "wrong", f"output '{name}'"
            return


def _true_of(declared: onnx.TypeProto, array: Any) -> bool:
    """Whether an array may have the type that a graph declares."""
    if not declared.tensor_type.HasField("shape"):
        return True
    dims = declared.tensor_type.shape.dim
    return len(dims) == array.ndim and all(
        dim.dim_value == size or not dim.HasField("dim_value") for dim, size in zip(dims, array.shape, strict=True)
    )


def _interface(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[Finding]:
    """What was declared of inputs and outputs has to stay; what was left open may be filled in."""
    for side in ("input", "output"):
        old, new = (_side(model, side) for model in (before, after))
        if list(old) != list(new):
            yield "interface", f"{side}s {list(old)} -> {list(new)}"
            continue
        for name, declared in old.items():
            found = _retyped(declared, new[name])
            if found is not None:
                yield found, f"{side} '{name}'"
                return


def _side(model: onnx.ModelProto, side: str) -> dict[str, onnx.TypeProto]:
    weights = {t.name for t in model.graph.initializer}
    return {v.name: v.type for v in getattr(model.graph, side) if side == "output" or v.name not in weights}


def _retyped(old: onnx.TypeProto, new: onnx.TypeProto) -> str | None:
    """The column in which a type that was declared otherwise counts."""
    kind = old.WhichOneof("value")
    if kind is None:
        return None
    if new.WhichOneof("value") != kind:
        return "interface"
    a, b = getattr(old, kind), getattr(new, kind)
    if kind in ("sequence_type", "optional_type"):
        return _retyped(a.elem_type, b.elem_type)
    if kind == "map_type":
        return "interface" if a.key_type != b.key_type else _retyped(a.value_type, b.value_type)
    if a.elem_type not in (0, b.elem_type):
        return "interface"
    if not a.HasField("shape"):
        return None
    if not b.HasField("shape") or len(a.shape.dim) != len(b.shape.dim):
        return "interface"
    pairs = list(zip(a.shape.dim, b.shape.dim, strict=True))
    if any(x.HasField("dim_value") and x.dim_value != y.dim_value for x, y in pairs):
        return "interface"
    return "dims" if any(x.dim_param and x.dim_param != y.dim_param for x, y in pairs) else None


def _lost_words(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[Finding]:
    if _lost(before, after) or _lost(before.graph, after.graph):
        yield "metadata", "of the model or graph"
        return
    said = defaultdict(list)
    for node in all_nodes(before):
        said[_identity(node)].append(node)
    for node in all_nodes(after):
        known = said.get(_identity(node), [])
        if known and all(_lost(one, node) for one in known):
            yield "metadata", f"of {node.op_type} '{node.name}'"
            return


def _identity(node: onnx.NodeProto) -> tuple[str, str]:
    """By what a node is known again, whatever it reads now."""
    return node.op_type, next((name for name in node.output if name), "")


def _lost(before: Any, after: Any) -> bool:
    """Whether the doc string is another, or metadata are missing; there may be more of them."""
    old, new = ({(p.key, p.value) for p in thing.metadata_props} for thing in (before, after))
    return before.doc_string not in ("", after.doc_string) or not old <= new


def _versions(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[Finding]:
    """Operator sets of domains that nothing uses any more may go."""
    if before.ir_version != after.ir_version:
        yield "versions", f"IR {before.ir_version} -> {after.ir_version}"
        return
    old, new = ({o.domain or "ai.onnx": o.version for o in m.opset_import} for m in (before, after))
    if any(old.get(domain) != version for domain, version in new.items()):
        yield "versions", f"opsets {old} -> {new}"


def _fixed(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[Finding]:
    """Before IR 4 initializers had to be inputs, and none could be replaced: there they may go, but not stay alone."""
    old, new = ({t.name for t in m.graph.initializer} & {v.name for v in m.graph.input} for m in (before, after))
    left = {t.name for t in after.graph.initializer}
    lost = sorted(name for name in old - new if name in left or before.ir_version >= 4)
    if lost:
        yield "overridable", ", ".join(lost[:3])


def in_half_precision(proto: onnx.ModelProto) -> bool:
    """Whether 16-bit floats occur: there the runtime's rounding depends on what stands beside a node.

    It runs a node between single-precision ones in single precision, also with its optimizations off.
    """
    for graph in (*graphs(proto), *proto.functions):
        values = (*graph.input, *graph.output, *graph.initializer) if isinstance(graph, onnx.GraphProto) else ()
        kinds = {v.data_type if isinstance(v, TensorProto) else v.type.tensor_type.elem_type for v in values}
        kinds |= {a.i for n in graph.node for a in n.attribute if a.name in ("to", "dtype", "softmax_precision")}
        kinds |= {a.t.data_type for n in graph.node for a in n.attribute if a.HasField("t")}
        if kinds & {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
            return True
    return False


def equal(a: Any, b: Any, *, rounding: bool) -> bool:
    """The same bits, or (``rounding``) the same but for the last bits of floats."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k], rounding=rounding) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y, rounding=rounding) for x, y in zip(a, b, strict=True))
    x, y = np.asarray(a), np.asarray(b)
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.dtype == object:
        return bool((x == y).all())
    if not rounding or x.dtype.kind != "f":
        return x.tobytes() == y.tobytes()
    scale = float(np.abs(x[np.isfinite(x)]).max(initial=0.0))
    step = float(np.finfo(x.dtype).eps)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    return bool(np.allclose(wide_x, wide_y, rtol=max(1e-4, 8 * step), atol=max(1e-5, 2 * step) * scale, equal_nan=True))
