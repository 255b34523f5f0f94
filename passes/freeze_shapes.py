"""Give dynamic dims of the inputs a size, on request."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.graph import nodes
from graphopt.passes._facts import Facts
from graphopt.traversal import ir_graphs

_ANY = ("?", "-1", "")
"""How a dim of an asked shape is written that stays as it is."""

Dim = int | str | None


@dataclass(frozen=True)
class FreezeShapes(Pass):
    """The inputs' dims only: not a node changes. What is computed from their sizes is then left to the other passes.

    ``dims`` are sizes by name (``batch=1``), ``inputs`` whole shapes (``image:1,3,224,224``, ``image:1x3x224x224``,
    ``image:[1,3,?,?]``; without a name where there is one input; ``?`` stays as it is). A name that gets a size gets it
    everywhere, declared shapes of outputs and inner values included, unless inference knows better.
    """

    dims: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    name: ClassVar[str] = "freeze-shapes"
    contract: ClassVar[Contract] = "exact"
    narrows: ClassVar[bool] = True

    def check(self, model: ir.Model) -> None:
        _Request(model, self.dims, self.inputs)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        request = _Request(model, self.dims, self.inputs)
        for value, shape in request.shapes.items():
            before = _dims(value)
            if before != shape:
                result.changes.append(Change("freeze", value.name or "", f"{_text(before)} -> {_text(shape)}"))
                value.shape = ir.Shape(shape)
        if result.changes:
            _declare(model, request.sizes)
        else:
            why = "every dim asked for has that size already" if self.dims or self.inputs else "no size is asked for"
            result.skipped.append(Skip("(graph)", why))
        return result


class _Request:
    """Sizes by name, and what the shapes of the inputs become.

    Raises:
        PreconditionError: unreadable, unknown (with what looks like it), or contradicting the model or itself.
    """

    def __init__(self, model: ir.Model, dims: Iterable[str], inputs: Iterable[str]) -> None:
        fed = {v.name: v for v in model.graph.inputs if v.name and v.name not in model.graph.initializers}
        self.sizes: dict[str, int] = {}
        named = dict.fromkeys(d for v in fed.values() for d in _dims(v) or () if isinstance(d, str))
        for text in dims:
            name, _, size = text.rpartition("=")
            if not name or not size.isdecimal() or int(size) < 1:
                raise PreconditionError(f"--dim '{text}' is no size; write batch=1")
            if name not in named:
                has = f"it has {', '.join(map(repr, named))}" if named else "its inputs have none"
                raise PreconditionError(f"the inputs have no symbolic dim '{name}'; {_near(name, named) or has}")
            self._bind(name, int(size), f"--dim '{text}'")
        self.shapes: dict[ir.Value, tuple[Dim, ...]] = {}
        for text in inputs:
            value, shape = _shape(text, fed)
            self._fit(value, shape, f"--input-shape '{text}'")
        for value in fed.values():
            known = self.shapes.get(value, _dims(value))
            if known is not None:
                self.shapes[value] = tuple(self.sizes.get(d, d) if isinstance(d, str) else d for d in known)

    def _bind(self, name: str, size: int, where: str) -> None:
        if self.sizes.setdefault(name, size) != size:
            raise PreconditionError(
                f"{where} gives dim '{name}' another size than {self.sizes[name]}; give it one size"
            )

    def _fit(self, value: ir.Value, asked: tuple[int | None, ...], where: str) -> None:
        """Lay the asked shape over the declared one."""
        declared = self.shapes.get(value, _dims(value))
        if declared is None:
            declared = (None,) * len(asked)
        if len(declared) != len(asked):
            raise PreconditionError(
                f"{where} has {len(asked)} dims, input '{value.name}' has {len(declared)}: {_text(declared)}; "
                "give as many ('?' for one that stays)"
            )
        made: list[Dim] = []
        for axis, (old, new) in enumerate(zip(declared, asked, strict=True)):
            if isinstance(old, int) and new is not None and old != new:
                raise PreconditionError(
                    f"{where} has {new} at axis {axis}, where input '{value.name}' has {old}; only dynamic dims can "
                    "be given a size"
                )
            if isinstance(old, str) and new is not None:
                self._bind(old, new, where)
            made.append(old if new is None else new)
        self.shapes[value] = tuple(made)


def _shape(text: str, fed: dict[str, ir.Value]) -> tuple[ir.Value, tuple[int | None, ...]]:
    """(the input, its shape) out of ``name:1,3,?`` and the like; names may hold colons."""
    name, colon, rest = text.rpartition(":")
    if not colon and len(fed) != 1:
        raise PreconditionError(f"--input-shape '{text}' names no input; write {next(iter(fed), 'name')}:1,3,224,224")
    name = name if colon else next(iter(fed))
    parts = [part.strip() for part in re.split(r"[,x]", rest.strip().removeprefix("[").removesuffix("]"))]
    if any(part not in _ANY[:2] and not (part.isdecimal() and int(part) > 0) for part in parts):
        raise PreconditionError(f"--input-shape '{text}' is no shape; write {name}:1,3,224,224")
    if name not in fed:
        raise PreconditionError(
            f"--input-shape '{text}': the model has no input '{name}'; "
            f"{_near(name, fed) or 'it has ' + (', '.join(map(repr, fed)) or 'none')}"
        )
    return fed[name], tuple(None if part in _ANY else int(part) for part in parts)


def _near(name: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else None


def _dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """The declared dims; -1 and the like, with which some exporters say "any", as None."""
    if value.shape is None:
        return None
    dims = (d if isinstance(d, int) else d.value for d in value.shape)
    return tuple(None if d in ("", "?") or (isinstance(d, int) and d < 0) else d for d in dims)


def _text(shape: tuple[Dim, ...] | None) -> str:
    return "[...]" if shape is None else f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


def _declare(model: ir.Model, sizes: dict[str, int]) -> None:
    """Declared shapes of everything computed: what inference finds, else the names' new sizes."""
    facts = Facts(model)
    made = [v for node in nodes(model) for v in node.outputs]
    for value in (*made, *(v for graph in ir_graphs(model) if graph is not model.graph for v in graph.inputs)):
        declared = _dims(value)
        if declared is None:
            continue
        known = facts.shape(value)
        known = known if known is not None and len(known) == len(declared) else (None,) * len(declared)
        new = [
            d if isinstance(d, int) else k if isinstance(k, int) else sizes.get(d, d) if d is not None else None
            for d, k in zip(declared, known, strict=True)
        ]
        if new != list(declared):
            value.shape = ir.Shape(new)
