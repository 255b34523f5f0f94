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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx
import onnx_ir as ir

from graphopt import surgery
from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import InputError
from graphopt.graph import label, nodes
from graphopt.model import fingerprint, load, replace, to_proto

View = Literal["proto", "gs", "ir"]


@dataclass(frozen=True)
class ForeignPass(Pass):
    """One foreign callable. ``use`` is how a recipe names it (``package.module:function``)."""

    use: str
    view: View
    contract: Contract = "exact"  # type: ignore[misc]  # the recipe says it, not the class
    function: Callable[..., Any] | None = None
    name: ClassVar[str] = "foreign"

    def __str__(self) -> str:
        return self.use

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Call it on the view it wants; its changes are the difference between before and after."""
        if not context.allows(self.use, self.use):
            return PassResult(skipped=[Skip(self.use, "switched off after a failed verification")])
        function = self.function if self.function is not None else resolve(self.use)
        before_nodes, before = Counter(f"{n.op_type} {label(n)}" for n in nodes(model)), fingerprint(model)
        if self.view == "ir":
            done = function(model) if not isinstance(function, type) else function()(model)
            if done.model is not model:
                replace(model, done.model)
        elif self.view == "gs":
            surgery.edit(model, function)
        else:
            result = function(to_proto(model))
            if isinstance(result, tuple):  # onnxsim.simplify and its kin answer (model, ok)
                result = result[0]
            if not isinstance(result, onnx.ModelProto):
                raise InputError(f"pass '{self.use}' returned a {type(result).__name__}, not an onnx.ModelProto")
            replace(model, load(result))
        if fingerprint(model) == before:
            return PassResult(skipped=[Skip("(graph)", "it changed nothing")])
        after_nodes = Counter(f"{n.op_type} {label(n)}" for n in nodes(model))
        gone, new = before_nodes - after_nodes, after_nodes - before_nodes
        summary = f"{sum(gone.values())} nodes gone, {sum(new.values())} new"
        return PassResult(changes=[Change("rewrite", self.use, summary)])


def foreign(function: Callable[..., Any], *, view: View | None = None, contract: Contract = "exact") -> ForeignPass:
    """Wrap a callable; its kind is read from its annotations, or is ``view`` where it has none (default ``proto``)."""
    name = getattr(function, "__qualname__", type(function).__name__)
    use = f"{getattr(function, '__module__', None) or type(function).__module__}:{name}"
    return ForeignPass(use, view or kind_of(function), contract, function)


def kind_of(function: Callable[..., Any]) -> View:
    """Which of the three kinds a callable is."""
    pass_base = ir.passes.PassBase
    if isinstance(function, pass_base) or (isinstance(function, type) and issubclass(function, pass_base)):
        return "ir"
    try:
        first = next(iter(inspect.signature(function).parameters))
        hint = str(typing.get_type_hints(function).get(first, ""))
    except (StopIteration, TypeError, NameError, ValueError):
        return "proto"
    return "gs" if "graphsurgeon" in hint and "Graph" in hint else "proto"


def resolve(use: str, folder: Path | None = None) -> Callable[..., Any]:
    """``package.module:function`` or ``path/file.py:function`` (relative to ``folder``) -> the callable.

    Raises:
        InputError: it does not import.
    """
    module_name, _, attribute = use.partition(":")
    try:
        if module_name.endswith(".py"):
            path = (folder or Path.cwd()) / module_name
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = sys.modules.get(module_name) or importlib.import_module(module_name)
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(f"cannot import pass '{use}': {error}; write package.module:function") from error
    if not callable(found):
        raise InputError(f"pass '{use}' is a {type(found).__name__}, not callable")
    return typing.cast("Callable[..., Any]", found)
