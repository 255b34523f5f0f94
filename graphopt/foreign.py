"""Callables that know nothing of graphopt, taken as passes unchanged.

Three kinds: ``ModelProto -> ModelProto`` (what onnxsim's ``custom_rewriter`` takes), a function that edits a
``gs.Graph`` in place, and an ``onnx_ir.passes.PassBase``. What they changed is read off the graph afterwards.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx
import onnx_ir as ir

from graphopt import surgery
from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import InputError, InternalError, ModelError, PreconditionError
from graphopt.graph import label, nodes
from graphopt.model import fingerprint, load, replace, to_proto
from graphopt.user_code import from_file, one_line, spelled

View = Literal["proto", "gs", "ir"]


@dataclass(frozen=True)
class ForeignPass(Pass):
    """One foreign callable. ``use`` is how a recipe names it (``package.module:function``)."""

    use: str
    view: View
    contract: Contract = "exact"  # type: ignore[misc]  # the recipe says it, not the class
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "foreign"

    def __post_init__(self) -> None:
        for key, known in (("view", View), ("contract", Contract)):
            if getattr(self, key) not in typing.get_args(known):
                raise ValueError(f"{key} is {getattr(self, key)!r}; one of {', '.join(typing.get_args(known))}")

    def __str__(self) -> str:
        return self.use

    def options(self) -> dict[str, Any]:
        """What a recipe says beside ``use``."""
        return {"view": self.view, "contract": self.contract}

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Call it on the view it wants; its changes are the difference between before and after."""
        if not context.allows(self.use, self.use):
            return PassResult(skipped=[Skip(self.use, "switched off after a failed verification")])
        function = self.function if self.function is not None else resolve(self.use)
        before_nodes, before = _count(model), fingerprint(model)
        try:
            _VIEWS[self.view](self.use, function, model)
        except ModelError as error:
            raise InternalError(f"it left a broken graph: {error}") from error
        if fingerprint(model) == before:
            return PassResult(skipped=[Skip("(graph)", "it changed nothing")])
        gone, new = before_nodes - _count(model), _count(model) - before_nodes
        summary = f"{sum(gone.values())} nodes gone, {sum(new.values())} new"
        return PassResult(changes=[Change("rewrite", self.use, summary)])


def _count(model: ir.Model) -> Counter[str]:
    return Counter(f"{n.op_type} {label(n)}" for n in nodes(model))


def _on_ir(use: str, function: Callable[..., Any], model: ir.Model) -> None:
    try:
        done = (function() if isinstance(function, type) else function)(model)
    except ir.passes.PreconditionError as error:
        raise PreconditionError(f"pass '{use}' cannot work on this model: {one_line(error)}") from error
    if not isinstance(done, ir.passes.PassResult):
        raise InputError(f"pass '{use}' returned a {type(done).__name__}, not an onnx_ir.passes.PassResult")
    if done.model is not model:
        replace(model, done.model)


def _on_gs(use: str, function: Callable[..., Any], model: ir.Model) -> None:
    del use
    surgery.edit(model, function)


def _on_proto(use: str, function: Callable[..., Any], model: ir.Model) -> None:
    result = function(to_proto(model))
    if isinstance(result, tuple) and result:  # onnxsim.simplify and its kin answer (model, ok)
        result = result[0]
    if not isinstance(result, onnx.ModelProto):
        raise InputError(f"pass '{use}' returned a {type(result).__name__}, not an onnx.ModelProto")
    replace(model, load(result))


_VIEWS: dict[str, Callable[[str, Callable[..., Any], ir.Model], None]] = {
    "ir": _on_ir,
    "gs": _on_gs,
    "proto": _on_proto,
}


def foreign(
    function: Callable[..., Any], *, use: str | None = None, view: View | None = None, contract: Contract = "exact"
) -> ForeignPass:
    """Wrap a callable; its kind is read from its annotations, or is ``view`` where it has none (default ``proto``)."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return ForeignPass(
        use or spelled(named) or f"{named.__module__}:{named.__qualname__}",
        view or kind_of(function),
        contract,
        function,
    )


def kind_of(function: Callable[..., Any]) -> View:
    """Which of the three kinds a callable is."""
    pass_base = ir.passes.PassBase
    if isinstance(function, pass_base) or (isinstance(function, type) and issubclass(function, pass_base)):
        return "ir"
    try:
        first = next(iter(inspect.signature(function).parameters.values()))
    except (StopIteration, TypeError, ValueError):
        return "proto"
    hint = str(first.annotation)
    try:
        hint = str(typing.get_type_hints(function).get(first.name, hint))
    except Exception:  # an annotation that names what only a type checker imports: its text has to do
        return "gs" if hint.endswith(("gs.Graph", "onnx_graphsurgeon.Graph")) else "proto"
    return "gs" if "graphsurgeon" in hint and "Graph" in hint else "proto"


def resolve(use: str) -> Any:
    """What ``package.module:name`` or ``path/file.py:name`` stands for.

    Raises:
        InputError: it does not import, or is not callable.
    """
    module_name, _, attribute = use.rpartition(":")
    if module_name.endswith(".py"):
        found = from_file(Path(module_name), attribute)
    else:
        try:
            module = sys.modules.get(module_name) or importlib.import_module(module_name)
            found = reduce(getattr, attribute.split("."), module)
        except (Exception, SystemExit) as error:  # somebody else's module may raise anything while it is imported
            raise InputError(f"cannot import pass '{use}': {one_line(error)}; write package.module:function") from error
    if not callable(found):
        raise InputError(f"pass '{use}' is a {type(found).__name__}, not callable")
    return found
