"""Give dynamic dims the sizes they will always have, on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError
from graphopt.passes._rewire import OFF


@dataclass(frozen=True)
class FreezeShapes(Pass):
    """``dims`` = ["batch=1"] sets a named dim everywhere, ``inputs`` = ["x:1,3,224,224"] the shape of one input.

    A name that an input's shape settles is set in all inputs and outputs. Exact for feeds of these shapes; others are
    refused by the runtime from then on. What the file says of inner values with dynamic dims is dropped as out of date.
    """

    dims: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    name: ClassVar[str] = "freeze-shapes"
    contract: ClassVar[Contract] = "exact"

    def __post_init__(self) -> None:
        for text in self.dims:
            _dim(text)
        for text in self.inputs:
            _input(text)

    def check(self, model: ir.Model) -> None:
        self._sizes(model)
        known = {str(d) for v in model.graph.inputs for d in v.shape or () if not isinstance(d, int) and d.value}
        unknown = [name for name in (_dim(text)[0] for text in self.dims) if name not in known]
        if unknown:
            raise PreconditionError(
                f"no input has a dim '{unknown[0]}'; its named dims are: {', '.join(sorted(known)) or 'none'}"
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        if not context.allows(self.name, "(graph)"):
            return PassResult(skipped=[Skip("(graph)", OFF)])
        sizes, given = self._sizes(model), dict(_input(text) for text in self.inputs)
        sides = [("input", v) for v in model.graph.inputs] + [("output", v) for v in model.graph.outputs]
        for side, value in sides:
            name = value.name or ""
            wanted = given.get(name) if side == "input" else None
            dims = _frozen(value, sizes, wanted)
            if dims is None or (value.shape is not None and dims == list(value.shape)):
                continue
            detail = f"{side} {name}: {_spell(value.shape)} -> {_spell(ir.Shape(dims))}"
            result.changes.append(Change("freeze", "(graph)", detail))  # one rewrite: half of it would be a lie
            value.shape = ir.Shape(dims)
        if result.changes:
            _drop_stale(model)
        elif not result.skipped:
            asked = self.dims or self.inputs
            why = "its inputs have these shapes already" if asked else "no shapes were asked for (dims, inputs)"
            result.skipped.append(Skip("(graph)", why))
        return result

    def _sizes(self, model: ir.Model) -> dict[str, int]:
        """Sizes of named dims, from both options.

        Raises:
            PreconditionError: they contradict each other or the model.
        """
        sizes = dict(_dim(text) for text in self.dims)
        inputs = {v.name: v for v in model.graph.inputs if v.name not in model.graph.initializers}
        for name, shape in (_input(text) for text in self.inputs):
            if name not in inputs:
                raise PreconditionError(f"there is no input '{name}'; the inputs are: {', '.join(map(str, inputs))}")
            declared = inputs[name].shape
            if declared is None:
                continue
            if len(declared) != len(shape):
                raise PreconditionError(f"input '{name}' is {_spell(declared)}; {shape} has another number of dims")
            for dim, size in zip(declared, shape, strict=True):
                if isinstance(dim, int):
                    if dim > 0 and dim != size:
                        raise PreconditionError(f"input '{name}' is {_spell(declared)}; {size} is not {dim}")
                elif dim.value and sizes.setdefault(dim.value, size) != size:
                    raise PreconditionError(f"dim '{dim.value}' would be both {sizes[dim.value]} and {size}")
        return sizes


def _dim(text: str) -> tuple[str, int]:
    name, mark, size = text.rpartition("=")
    if not mark or not name or not size.strip().isdigit() or int(size) < 1:
        raise ValueError(f"'{text}' is no dim and size; write it like batch=1")
    return name, int(size)


def _input(text: str) -> tuple[str, list[int]]:
    """The name may have colons in it, so the last one counts."""
    name, mark, shape = text.rpartition(":")
    sizes = [part.strip() for part in shape.split(",")] if shape.strip() else []
    if not mark or not name or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"'{text}' is no input and shape; write it like x:1,3,224,224")
    return name, [int(size) for size in sizes]


def _frozen(value: ir.Value, sizes: dict[str, int], wanted: list[int] | None) -> list[int | ir.SymbolicDim] | None:
    if wanted is not None:
        return list(wanted)
    if value.shape is None:
        return None
    return [d if isinstance(d, int) or d.value is None else sizes.get(d.value, d) for d in value.shape]


def _drop_stale(model: ir.Model) -> None:
    """What was said of inner values in terms of dynamic dims."""
    outside = {*model.graph.inputs, *model.graph.outputs}
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)):
            if value not in outside and value.shape is not None and any(not isinstance(d, int) for d in value.shape):
                value.shape = None


def _spell(shape: ir.Shape | None) -> str:
    if shape is None:
        return "[...]"
    return f"[{','.join(str(d) if isinstance(d, int) else d.value or '?' for d in shape)}]"
