"""A slice of tools/conformance.py: every exact pass over onnx.backend.test's models, in all variants."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import conformance

from graphopt.base import Change, Context, Contract, Pass, PassResult
from graphopt.graph import nodes

EVERY = 60
BAD = ("invalid", "wrong", "crashed", "grown")


def test_a_slice_of_all_cases_in_all_variants() -> None:
    """Every 60th case; `python tools/conformance.py` runs them all."""
    # upgrade-opset leaves functions of an older operator set behind, which the checker refuses: not yet held to this.
    names = [name for name in conformance.exact_passes() if name != "upgrade-opset"]
    numbers = list(range(0, len(conformance.sources()), EVERY))
    tally = conformance.run_cases((numbers, conformance.KINDS, names, tuple(conformance.VARIANTS)))
    assert not tally.failures
    assert all(tally.counts[name, "cases"] > len(numbers) for name in names)
    assert sum(tally.counts[name, "changed"] for name in names) > 20
    assert not any(tally.counts[name, column] for name in names for column in BAD)


@dataclass(frozen=True)
class Spoil(Pass):
    """Does ``what`` to the model, all of it wrong."""

    what: str = "operator"
    name: ClassVar[str] = "spoil"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        node = next(iter(nodes(model)))
        if self.what == "operator":
            node.op_type = "Neg"
        elif self.what == "attribute":
            node.attributes["nonsense"] = ir.AttrInt64("nonsense", 1)
        elif self.what == "name":
            model.graph.outputs[0].name = "other"
        elif self.what == "size":
            weight = ir.tensor(np.zeros(4096, np.float32), name="dead")
            model.graph.register_initializer(ir.Value(name="dead", const_value=weight))
        else:
            raise RuntimeError("on purpose")
        return PassResult([Change("spoil", "(graph)")])


@pytest.mark.parametrize(
    ("what", "column"),
    [("operator", "wrong"), ("attribute", "invalid"), ("name", "invalid"), ("size", "grown"), ("crash", "crashed")],
)
def test_what_is_wrong_is_seen(what: str, column: str) -> None:
    source = next(s for s in conformance.sources() if s.name == "test_abs")
    assert conformance.judge(conformance.Reference(*source.read()), Spoil(what))[0] == column


@pytest.mark.parametrize("variant", conformance.VARIANTS)
def test_the_variants_are_models_that_run(variant: str) -> None:
    source = next(s for s in conformance.sources() if s.name == "test_add")
    made = conformance.VARIANTS[variant](*source.read())
    assert made is not None
    reference = conformance.Reference(*made)
    assert reference.valid
    assert reference.ran is not None


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pass", "eliminate-identities", "--variant", "plain", "--limit", "5", "--kind", "simple"]
    assert conformance.main(arguments) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["pass", *conformance.COLUMNS]
    assert row.split()[:2] == ["eliminate-identities", "5"]
