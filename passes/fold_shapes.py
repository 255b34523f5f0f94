"""Sizes that are computed in the graph and known beforehand become constants; dims stay symbolic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.graph import attribute, bodies, constant, is_op, label, nodes, value_names
from graphopt.passes._dims import begins, product, quotient, weak
from graphopt.passes._facts import Facts
from graphopt.passes._rewire import OFF, remove
from graphopt.passes._weights import add_constant, node_bytes, tensor_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KINDS = {ir.DataType.INT64: np.int64, ir.DataType.INT32: np.int32, ir.DataType.BOOL: np.bool_}

Use = tuple[ir.Node, int]


@dataclass(eq=False)
class _Edit:
    """Uses of a value that will read a constant instead."""

    old: ir.Value
    array: NDArray[Any]
    uses: list[Use]
    site: ir.Node
    detail: str
    whole: bool = field(default=False)
    """Whether the constant takes over the value's name, since nobody reads the value any more."""


@dataclass(frozen=True)
class FoldShapes(Pass):
    """``Shape(x)[1]`` where that dim is fixed, and what is computed from it; targets of Reshape that mix fixed dims
    with dims that are copied (0) or left open (-1).

    Judged by inferred facts only, never by declared shapes. An open dim is used only beside fixed ones, so that empty
    inputs work as before. Nothing is done where the constants would take more of the file than the nodes that go.
    """

    name: ClassVar[str] = "fold-shapes"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        # Inference takes seconds on a large graph, and where no size is computed it has nothing to say.
        edits = _Finder(model, Facts(model)).edits() if any(map(_promising, nodes(model))) else []
        allowed = [edit for edit in edits if context.allows(self.name, label(edit.site))]
        kept = _affordable(allowed)
        for edit in edits:
            if edit in kept:
                result.changes.append(Change("fold", label(edit.site), edit.detail))
            else:
                why = "the constant would take more of the file than what goes" if edit in allowed else OFF
                result.skipped.append(Skip(label(edit.site), f"{edit.site.op_type}: {why}"))
        taken = value_names(model)
        for edit in kept:
            _apply(model, edit, taken)
        _sweep(edit.old.producer() for edit in kept)
        if not edits:
            result.skipped.append(Skip("(graph)", "no size that is computed is known beforehand"))
        return result


def _promising(node: ir.Node) -> bool:
    """Whether a size may begin to be known here, or be used."""
    if is_op(node, "Reshape"):
        return len(node.inputs) > 1 and constant(node.inputs[1]) is None
    return begins(node)


class _Finder:
    """Looks for values and targets that are known."""

    def __init__(self, model: ir.Model, facts: Facts) -> None:
        self.all = list(nodes(model))
        self.facts = facts

    def edits(self) -> list[_Edit]:
        """In the order of the nodes; a use is in one of them at most."""
        found: list[_Edit] = []
        known = {node.outputs[0]: array for node in self.all if (array := self._value(node)) is not None}
        for value, array in known.items():
            # Nodes between that are known too will be gone, so that nothing has to be stored for them.
            uses = [(use.node, use.idx) for use in value.uses() if not self._known_too(use.node, known)]
            producer = value.producer()
            assert producer is not None
            if uses and not value.is_graph_output():
                detail = f"{producer.op_type}: {array.tolist()} whatever the input"
                found.append(_Edit(value, array, uses, producer, detail, whole=len(uses) == len(value.uses())))
        targets: dict[tuple[Any, ...], _Edit] = {}
        for node in self.all:
            target = node.inputs[1] if is_op(node, "Reshape") and len(node.inputs) > 1 else None
            if target is None or target in known or constant(target) is not None:
                continue
            made = self._target(node)
            if made is not None:
                detail = f"Reshape: its target is {made.tolist()}"
                edit = _Edit(target, made, [], node, detail)
                targets.setdefault((target, node.graph, tuple(made)), edit).uses.append((node, 1))
        return found + list(targets.values())

    def _known_too(self, node: ir.Node, known: dict[ir.Value, NDArray[Any]]) -> bool:
        return bool(node.outputs) and node.outputs[0] in known and not node.outputs[0].is_graph_output()

    def _value(self, node: ir.Node) -> NDArray[Any] | None:
        """What a node makes, where that is known; constants of constants are left to fold-constants."""
        if (
            is_op(node, "Constant")
            or not node.outputs
            or not node.outputs[0].name
            or len(node.outputs) > 1
            or bodies(node)
        ):
            return None
        kind = _KINDS.get(self.facts.dtype(node.outputs[0]) or ir.DataType.UNDEFINED)
        entries = self.facts.data.known.get(node.outputs[0])
        if kind is None or entries is None or not all(isinstance(d, int) for d in entries.reshape(-1)):
            return None
        if all(constant(v) is not None for v in node.inputs if v is not None):
            return None
        return np.asarray(entries.tolist(), kind)

    def _target(self, node: ir.Node) -> NDArray[np.int64] | None:
        """A constant that reshapes to the same on every input, or None."""
        target, source = self.facts.data.of(node.inputs[1]), self.facts.shape(node.inputs[0])
        if target is None or target.ndim != 1 or attribute(node, "allowzero", 0):
            return None
        made: list[int] = []
        for axis, dim in enumerate(target.tolist()):
            copied = source is not None and axis < len(source) and dim is not None and source[axis] == dim
            made.append(dim if isinstance(dim, int) else 0 if copied else -1)
            if isinstance(dim, int) or copied or weak(dim):
                continue
            rest = product(*(d for i, d in enumerate(target.tolist()) if i != axis))
            if source is None or quotient(product(*source), rest) != dim:
                return None  # what the dim is would not be known any more
        if made.count(-1) > 1 or (-1 in made and -1 not in target.tolist() and any(dim == 0 for dim in made)):
            return None
        return np.asarray(made, np.int64)


def _affordable(edits: list[_Edit]) -> list[_Edit]:
    """All of them where the file does not grow, else those that pay for themselves."""
    if sum(map(_stored, edits)) <= _freed(edits):
        return edits
    return [edit for edit in edits if _stored(edit) <= _freed([edit])]


def _stored(edit: _Edit) -> int:
    return tensor_bytes(edit.array)


def _freed(edits: list[_Edit]) -> int:
    """Bytes of the nodes that nobody needs any more after these."""
    gone: set[Use] = {use for edit in edits for use in edit.uses}
    waiting = [edit.old.producer() for edit in edits]
    dead: set[ir.Node] = set()
    total = 0
    while waiting:
        node = waiting.pop()
        if node is None or node in dead or not _idle(node, gone):
            continue
        dead.add(node)
        total += node_bytes(node)
        gone |= {(node, index) for index in range(len(node.inputs))}
        waiting += [value.producer() for value in node.inputs if value is not None]
    return total


def _idle(node: ir.Node, gone: set[Use]) -> bool:
    return not bodies(node) and all(
        not value.is_graph_output() and all((use.node, use.idx) in gone for use in value.uses())
        for value in node.outputs
    )


def _apply(model: ir.Model, edit: _Edit, taken: set[str]) -> None:
    graph = edit.site.graph if not edit.whole else edit.old.producer().graph  # type: ignore[union-attr]
    assert isinstance(graph, ir.Graph)
    name = edit.old.name or "size"
    if edit.whole:
        edit.old.name = None
        taken.discard(name)
    new = add_constant(model, graph, name, edit.array, taken, edit.site)
    if edit.whole:
        new.doc_string = edit.old.doc_string
        new.metadata_props.update(edit.old.metadata_props)
    for node, index in edit.uses:
        node.replace_input_with(index, new)


def _sweep(started: Iterable[ir.Node | None]) -> None:
    """Take out the nodes that nobody reads any more, and those before them."""
    waiting = list(started)
    while waiting:
        node = waiting.pop()
        if node is None or node.graph is None or not _idle(node, set()):
            continue
        before = [value.producer() for value in node.inputs if value is not None]
        remove([node])
        waiting += before
