"""Take initializers out of the graph's inputs, on request: nobody can override them any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip


@dataclass(frozen=True)
class FoldOverridable(Pass):
    """They are constants from then on, which the other passes fold and fuse.

    Before IR 4 every initializer had to be an input: nothing is done there.
    """

    name: ClassVar[str] = "fold-overridable"
    contract: ClassVar[Contract] = "exact"
    narrows: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        inputs = model.graph.inputs
        found = [v for v in inputs if v.name in model.graph.initializers]
        if not found:
            return PassResult(skipped=[Skip("(graph)", "no initializer is an input")])
        if model.ir_version < 4:
            why = (
                f"at IR version {model.ir_version} all {len(found)} initializers must be inputs; "
                "--opset 9 or later comes with an IR version that lets them go"
            )
            return PassResult(skipped=[Skip("(graph)", why)])
        for value in found:
            inputs.remove(value)
        return PassResult([Change("fold", value.name or "", "an input no more, but a constant") for value in found])
