"""Does verification find wrong rewrites, and blame them alone? Plants mistakes among right rewrites and looks.

    python tools/verifier_mutation.py [--only NAME]... [--cost]

Each mistake is one rewrite of a pass with the contract "exact", which makes several right ones too, between other exact
passes. *Detected*: the result is not the mistaken one. *Isolated*: only that rewrite was reverted; the others, and all
other passes, stand. Prints one line per mistake and both shares; exits 1 where one escapes. ``--cost``: what share of
the processor time of optimizing the fixtures is verification.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
from mistakes import RIGHT, Mutation
from mutations import MUTATIONS

from graphopt.base import Change, Context, Contract, Pass, PassResult
from graphopt.graph import nodes
from graphopt.ledger import RunResult
from graphopt.manager import PassManager
from graphopt.model import load
from graphopt.presets import EXACT_PASSES
from graphopt.registry import create

MODELS = Path(__file__).resolve().parent.parent / "fixtures" / "models"
AROUND = ("fold-constants", "eliminate-duplicates", "remove-unused")


@dataclass(frozen=True)
class Mutant(Pass):
    """Takes out every Identity, which is right, and makes one mistake."""

    mutation: Mutation
    name: ClassVar[str] = "mutant"
    contract: ClassVar[Contract] = "exact"

    def options(self) -> dict[str, Any]:
        """A mutation is nothing that a recipe could hold."""
        return {}

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        for node in list(nodes(model)):
            wrong = node.name == self.mutation.at
            if not (wrong or (node.op_type == "Identity" and str(node.name).startswith("right"))):
                continue
            if not context.allows(self.name, str(node.name)):
                continue
            if wrong:
                self.mutation.edit(model, node)
            else:
                node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
                model.graph.remove([node], safe=True)
            result.changes.append(Change("mutate" if wrong else "eliminate", str(node.name)))
        return result


@dataclass
class Outcome:
    """What became of one mistake."""

    name: str
    detected: bool
    isolated: bool
    why: str


def judge(mutation: Mutation) -> Outcome:
    """Run the mistake among right rewrites and right passes."""
    pipeline = [create(AROUND[0], {}), Mutant(mutation), *(create(n, {}) for n in AROUND[1:])]
    model = load(mutation.model())
    result = PassManager(pipeline).run(model, Context(original=model, threads=1))
    entry = next(e for e in result.ledger if e.name == "mutant")
    kept = [c.site for c in entry.changes]
    detected = mutation.at not in kept
    right = [f"right{i}" for i in range(RIGHT)]
    others = [e for e in result.reverted if e is not entry]
    isolated = detected and entry.status == "partly reverted" and sorted(kept) == right and not others
    return Outcome(mutation.name, detected, isolated, str(entry.reason or "kept: no difference was seen"))


def cost() -> list[str]:
    """Processor time of the default exact passes on the fixtures, with verification and without."""
    lines, totals = [], [0.0, 0.0]
    passes = [create(name, {}) for name in EXACT_PASSES]
    for path in sorted(MODELS.glob("*.onnx")):
        model = load(path)
        taken = []
        for verify in ("off", "end"):
            best = float("inf")
            for _ in range(3):
                started = time.process_time()
                result: RunResult = PassManager(passes, verify=verify).run(model, Context(original=model, threads=1))
                best = min(best, time.process_time() - started)
            assert not result.reverted, (path, result.reverted[0].reason)
            taken.append(best)
        totals = [a + b for a, b in zip(totals, taken, strict=True)]
        lines.append(f"{path.name:20} {1000 * (taken[1] - taken[0]):8.1f} of {1000 * taken[1]:8.1f} ms")
    share = 100 * (1 - totals[0] / totals[1])
    return [*lines, f"verification: {1000 * (totals[1] - totals[0]):.0f} of {1000 * totals[1]:.0f} ms ({share:.0f} %)"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options_of.add_argument("--only", action="append", choices=[m.name for m in MUTATIONS])
    options_of.add_argument("--cost", action="store_true", help="print what verification costs on the fixtures, too")
    options = options_of.parse_args(arguments)
    chosen = [m for m in MUTATIONS if not options.only or m.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # reproducers
        try:
            found = [judge(m) for m in chosen]
        finally:
            tempfile.tempdir = None
        for outcome in found:
            word = "isolated" if outcome.isolated else "detected" if outcome.detected else "ESCAPED"
            print(f"{outcome.name:30} {word:9} {' '.join(outcome.why.split())[:110]}")
        for column in ("detected", "isolated"):
            count = sum(getattr(o, column) for o in found)
            print(f"{column}: {count} of {len(found)} ({100 * count / len(found):.0f} %)")
        if options.cost:
            print("\n".join(cost()))
    return 0 if all(o.isolated for o in found) else 1


if __name__ == "__main__":
    sys.exit(main())
