"""A slice of tools/fuzz.py, and that it would see what is wrong; ``python tools/fuzz.py`` runs thousands."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import fuzz
import fuzz_verbs
from growing_layers import Made, graphs, make

from graphopt.base import Change, Context, Contract, Pass, PassResult
from graphopt.errors import NothingDone
from graphopt.graph import nodes
from graphopt.session import Session


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(graphs())
def test_random_graphs(made: Made) -> None:
    _, problems = fuzz.examine(made, fuzz.ours(), random.Random(0))
    assert not problems, f"{problems}\n{onnx.printer.to_text(made.model)}"


def test_the_graphs_are_valid_and_of_all_kinds() -> None:
    seen: set[str] = set()
    ran = dead = overridable = passed_through = 0
    for seed in range(60):
        made = make(random.Random(seed))
        onnx.checker.check_model(made.model, full_check=True)
        graph = made.model.graph
        seen |= {n.op_type for n in graph.node}
        read = {n for node in graph.node for n in node.input} | {o.name for o in graph.output}
        dead += any(not read & set(node.output) for node in graph.node)
        overridable += bool(made.overridable)
        passed_through += bool({i.name for i in graph.input} & {o.name for o in graph.output})
        ran += fuzz.examine(made, [], random.Random(0))[0]["run"]
    assert ran >= 55
    assert len(seen) >= 60
    assert {"If", "Loop", "Conv", "BatchNormalization", "Gemm", "MatMul", "Reshape", "Range", "Where"} <= seen
    assert min(dead, overridable, passed_through) > 0


def test_a_graph_told_otherwise_computes_the_same() -> None:
    for seed in range(8):
        made = make(random.Random(seed))
        other = fuzz.renamed(fuzz.shuffled(made.model, random.Random(1)))
        onnx.checker.check_model(other)
        for feed in made.feeds:
            before, after = (Session(m, optimize=False, threads=1).run(feed) for m in (made.model, other))
            assert all(np.array_equal(before[k], after[k], equal_nan=before[k].dtype.kind == "f") for k in before)


@dataclass(frozen=True)
class Spoil(Pass):
    """Does something that must be seen."""

    what: str
    name: ClassVar[str] = "spoil"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        first = next(n for n in nodes(model) if n.op_type == "Neg")
        if self.what == "wrong":
            first.op_type = "Abs"
        elif self.what == "invalid":
            first.attributes["nonsense"] = ir.AttrInt64("nonsense", 1)
        elif self.what == "interface":
            model.graph.outputs[0].name = "other"
        elif self.what == "reverted":
            raise ValueError("on purpose")
        elif self.what == "not idempotent":
            twice = ir.node("Abs", [first.inputs[0]], name=f"more{len(list(model.graph))}")
            model.graph.insert_before(first, twice)
        else:
            first.name = f"{first.name}_x"
            if first.outputs[0].name == "v0_0":
                second = ir.node("Identity", [first.outputs[0]], name="again")
                model.graph.append(second)
        return PassResult([Change("spoil", str(first.name))])


@pytest.mark.parametrize("what", fuzz.KINDS)
def test_what_is_wrong_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text = """<ir_version: 8, opset_import: ["" : 17]>
        m (float[N, 2] x) => (float[N, 2] y) { v0_0 = Neg(x) y = Exp(v0_0) }"""
    feeds = [{"x": np.ones((n, 2), np.float32)} for n in (2, 1)]
    made = Made(onnx.parser.parse_model(text), feeds, frozenset(), {})
    assert fuzz.examine(made, [], random.Random(0))[1] == []
    _, problems = fuzz.examine(made, [Spoil(what)], random.Random(0))
    assert what in {p.partition(":")[0] for p in problems}


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--graphs", "2", "--seed", "3"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row[:18].strip() for row in rows] == [*fuzz.COLUMNS, *fuzz.KINDS]
    assert rows[0].split() == ["graphs", "2"]


@pytest.mark.parametrize("seed", [35, 8017, 8062, 50327])
def test_graphs_that_once_failed(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--graphs", "1", "--seed", str(seed)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("verb", "graphs"), [("quantize", 12), ("prune", 12), ("compress", 12), ("halves", 20)])
def test_a_slice_of_every_verb(verb: str, graphs: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Among them graphs that once failed: 108 of quantize (zeros only, in smooth)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz_verbs.Simplify, "check", fuzz_verbs.Simplify.check)  # put back afterwards
        code = fuzz_verbs.main([verb, "--graphs", str(graphs), "--seed", "100"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "no reason was given" not in told
    assert int(told.split(" done")[0].split()[-1]) >= graphs // 2, told


@pytest.mark.parametrize("what", ["the report says", "depends on names", "not idempotent", "crash"])
def test_what_a_verb_does_wrong_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_verbs.Simplify, "check", fuzz_verbs.Simplify.check)
    fuzz_verbs.without_onnxsim()
    calls = 0

    def spoiled(model: Any, made: Made, rnd: random.Random) -> Any:
        """Right at first, at the second run (of what the first made) or the third (of the same with other names)."""
        nonlocal calls
        calls += 1
        if isinstance(model, bytes) and what != "not idempotent":
            raise NothingDone("as it should be; nothing")
        found = fuzz_verbs.compress(made.model, made, rnd)
        if what == "the report says":
            for row in found.report["comparison"]["outputs"]:
                row.update(sqnr_db=3.0, identical=False)
        elif what == "crash":
            raise ZeroDivisionError("on purpose")
        elif calls > 1:
            found.ir_model.graph.append(ir.node("Identity", [found.ir_model.graph.outputs[0]], name="more"))
        return found

    monkeypatch.setitem(fuzz_verbs.VERBS, "compress", spoiled)
    made = make(random.Random(102), 18, fuzz_verbs.WIDE)
    _, problems = fuzz_verbs.examine("compress", made, 102)
    assert any(problem.startswith(what) for problem in problems), problems
