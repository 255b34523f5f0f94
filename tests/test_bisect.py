"""``graphopt bisect``: it names the pass, the rewrite and the value, and the piece it writes still shows it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import conditional, model, parsed, value, weight
from conftest import DEMO, MODELS, ROOT, run_cli
from onnx import helper
from test_schema import check

import graphopt
from graphopt.base import Change, Context, Contract, Pass, PassResult
from graphopt.graph import nodes
from graphopt.report.bisection import print_bisection
from graphopt.session import Session

PAGE = (ROOT / "docs" / "bisect.md").read_text("utf-8")

MINE = '''"""Relu as Clip, for a runtime that has no Relu; the upper bound was a guess."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult


@dataclass(frozen=True)
class ReluToClip(Pass):
    name: ClassVar[str] = "relu-to-clip"
    contract: ClassVar[Contract] = "exact"
    bound: float = 12.0

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        for node in [n for n in model.graph if n.op_type == "Relu"]:
            if not context.allows(self.name, node.name):
                continue
            bounds = [ir.Value(name=f"{node.name}_{k}", const_value=ir.tensor(np.float32(b)))
                      for k, b in (("min", 0), ("max", self.bound))]
            for value in bounds:
                model.graph.register_initializer(value)
            clip = ir.node("Clip", [node.inputs[0], *bounds], name=node.name)
            clip.outputs[0].name = node.outputs[0].name
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [clip], node.outputs, clip.outputs)
            result.changes.append(Change("replace", node.name))
        return result


def leaky(model):
    next(n for n in model.graph.node if n.op_type == "Relu").op_type = "LeakyRelu"
    return model


def crash(model):
    raise ValueError("out of luck")
'''


@pytest.fixture
def example(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that docs/bisect.md names."""
    monkeypatch.setattr("tempfile.tempdir", str(workplace.parent))
    shutil.copy(DEMO / "digits.onnx", "digits.onnx")
    shutil.copy(DEMO / "calibration.npz", "calibration.npz")
    Path("mine.py").write_text(MINE)
    return workplace


def test_the_example_in_the_docs(example: Path) -> None:
    command, shown = re.search(r"^\$ graphopt (.*?)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL).groups()  # type: ignore[union-attr]
    ran = run_cli(*command.split())
    assert ran.code == 1, ran.err
    assert ran.err == ""
    numbers = re.compile(r"\d+\.\d+(e-\d+)?")  # the last digits are this machine's
    assert [numbers.sub("#", line) for line in ran.out.splitlines()] == [
        numbers.sub("#", line) for line in shown.splitlines()
    ]
    again = run_cli(*shown.splitlines()[-1].split()[1:], "--json")
    assert again.code == 1, again.err
    assert again.json["guilty"][0]["pass"] == "relu-to-clip"
    assert again.json["repro"]["nodes"] == 1


def test_the_piece_and_its_inputs_show_it_without_graphopt(example: Path) -> None:
    assert run_cli("bisect", "digits.onnx", "--passes", "mine.py:leaky", "-o", "r.onnx", "-q").code == 1
    piece = onnx.load("r.onnx")
    onnx.checker.check_model(piece, full_check=True)
    assert [n.op_type for n in piece.graph.node] == ["Relu"]
    with np.load("r.npz") as stored:
        feeds = {k: stored[k][0] for k in stored.files}
    before = Session(piece, optimize=False, threads=1).run(feeds)
    piece.graph.node[0].op_type = "LeakyRelu"
    after = Session(piece, optimize=False, threads=1).run(feeds)
    assert any(not np.array_equal(before[k], after[k]) for k in before)


def test_nothing_diverges(workplace: Path, untouched: Callable[[Path], AbstractContextManager[None]]) -> None:
    shutil.copy(DEMO / "digits.onnx", "digits.onnx")
    with untouched(workplace):
        ran = run_cli("bisect", "digits.onnx", "-o", "repro.onnx", "--passes", "fuse-batchnorm,remove-unused")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("digits.onnx: nothing diverges (2 passes)\n")
    found = graphopt.bisect("digits.onnx", passes=["remove-unused"])
    assert (found.model, found.feed, found.save("repro.onnx")) == (None, None, [])
    check(found.report, "bisected")


def test_json_is_as_documented(example: Path) -> None:
    ran = run_cli("bisect", "digits.onnx", "--passes", "mine.py:ReluToClip,mine.py:crash", "-o", "r.onnx", "--json")
    assert ran.code == 1, ran.err
    check(ran.json, "bisected")
    tables = [set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", part, re.MULTILINE))))
              for part in PAGE.split("## JSON")[1].split("\n`")]  # fmt: skip
    assert [set(part) for part in (ran.json["guilty"][0], ran.json["value"], ran.json["repro"])] == tables
    assert [g["step"] for g in ran.json["guilty"]] == [1, 2]
    assert "out of luck" in ran.json["guilty"][1]["reason"]
    assert 0 < len(ran.json["guilty"][0]["sites"]) < ran.json["guilty"][0]["rewrites"] == 7


def test_quiet_and_verbose(example: Path) -> None:
    command = ["bisect", "digits.onnx", "--passes", "mine.py:ReluToClip"]
    assert run_cli(*command, "-q").out == ""
    verbose = run_cli(*command, "-v").out
    sites = run_cli(*command, "--json").json["guilty"][0]["sites"]
    assert all(site in verbose for site in sites)
    assert "exact passes compared with" in verbose


def test_a_crash_is_named_with_the_whole_model(example: Path) -> None:
    found = graphopt.bisect("digits.onnx", passes=["mine.py:crash"])
    check(found.report, "bisected")
    assert found.report["value"] is None
    assert "out of luck" in found.report["guilty"][0]["reason"]
    assert found.feed is None
    Path("a folder").mkdir()
    found.save("a folder/r.onnx")
    ran = run_cli(*shlex.split(found.report["repro"]["command"])[1:])
    assert ran.code == 1
    assert "out of luck" in ran.out
    assert not Path("a folder/r.npz").exists()


@dataclass(frozen=True)
class Swap(Pass):
    """Replaces operators; ``needs`` one that reads the result, else it leaves them alone."""

    old: str = "Neg"
    new: str = "Abs"
    needs: str = ""
    name: ClassVar[str] = "swap"
    contract: ClassVar[Contract] = "exact"

    def run(self, model: ir.Model, context: Context) -> PassResult:
        result = PassResult()
        for node in nodes(model):
            readers = {user.op_type for user, _ in node.outputs[0].uses()}
            if node.op_type == self.old and (not self.needs or self.needs in readers):
                site = str(node.name)
                if context.allows(self.name, site):
                    node.op_type = self.new
                    result.changes.append(Change("swap", site))
        return result


def bisect(proto: onnx.ModelProto, *passes: Any, **options: Any) -> graphopt.Bisection:
    return graphopt.bisect(proto, passes=list(passes), threads=1, **options)


def test_the_piece_holds_what_the_rewrite_looks_at_and_no_more() -> None:
    names = ["Relu", "Exp", "Neg", "Sin", "Tanh", "Softsign"]
    chain = [helper.make_node(op, [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i, op in enumerate(names)]
    found = bisect(model(chain, [value("v0", ("n", 3))], [value("v6", ("n", 3))]), Swap("Neg", "Relu", "Sin"))
    assert found.report["value"]["node"] in ("n2", "n3")
    assert [n.op_type for n in found.model.graph.node] == ["Neg", "Sin"]  # type: ignore[union-attr]
    assert list(found.feed or ()) == ["v2"]
    assert found.report["repro"]["of"] == 6


def test_inside_a_body() -> None:
    found = bisect(conditional(3), Swap("Relu", "Abs"))
    assert found.report["value"]["op_type"] == "If"
    assert [n.op_type for n in found.model.graph.node] == ["If"]  # type: ignore[union-attr]


def test_two_inputs_of_which_one_is_behind_a_weight() -> None:
    graph = [
        helper.make_node("Mul", ["x", "w"], ["a"], name="mul"),
        helper.make_node("Neg", ["y"], ["b"], name="neg"),
        helper.make_node("Add", ["a", "b"], ["z"], name="add"),
        helper.make_node("Relu", ["z"], ["o"], name="relu"),
    ]
    proto = model(graph, [value("x", ("n", 3)), value("y", ("n", 3))], [value("o", ("n", 3))], [weight("w", [1, 2, 3])])
    found = bisect(proto, Swap("Mul", "Add"))
    assert found.report["value"]["value"] == "a"
    piece = found.model
    assert piece is not None
    assert [i.name for i in piece.graph.input] == ["x"]
    assert [t.name for t in piece.graph.initializer] == ["w"]
    assert found.report["value"]["differ"] == found.report["value"]["elements"]


def test_two_guilty_passes_the_first_is_looked_into(capsys: pytest.CaptureFixture[str]) -> None:
    proto = parsed("agraph (float[N, 2] x) => (float[N, 2] y) { a = Neg(x)  b = Relu(a)  y = Sin(b) }")
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    found = bisect(proto, Swap("Sin", "Cos"), Swap("Neg", "Abs"))
    assert [g["sites"] or g["rewrites"] for g in found.report["guilty"]] == [1, 1]
    assert found.report["value"]["op_type"] == "Sin"
    print_bisection(found.report)
    assert "also     swap (step 2): the pass as a whole" in capsys.readouterr().out


def test_the_callers_model_is_not_touched() -> None:
    proto = parsed("agraph (float[N, 2] x) => (float[N, 2] y) { y = Neg(x) }")
    before = proto.SerializeToString(deterministic=True)
    assert bisect(proto, Swap()).report["exit_code"] == 1
    assert proto.SerializeToString(deterministic=True) == before


def test_what_only_shows_with_nan_is_told_as_text() -> None:
    proto = parsed("agraph (float[N, 2] x) => (float[N, 2] y) { y = Log(x) }")
    found = bisect(proto, Swap("Log", "Exp"))
    assert json.loads(json.dumps(found.report["value"]["first"])) == found.report["value"]["first"]
    assert "nan" in {found.report["value"][k]["before"] for k in ("first", "worst")}


def test_what_cannot_be_run_cannot_be_bisected(untouched: Any, workplace: Path) -> None:
    with untouched(workplace):
        ran = run_cli("bisect", MODELS / "custom.onnx", "-o", "repro.onnx")
    assert ran.code == 3
    assert "nothing could be bisected" in ran.error


GOOD = str(DEMO / "digits.onnx")
BAD = {
    "no-exact-pass": (["--passes", "quantize-dynamic"], "no exact pass"),
    "unknown-pass": (["--passes", "fold"], "unknown pass 'fold'"),
    "no-passes": (["--passes", ","], "no passes"),
    "no-file": (["--passes", "nope.py:f"], "nope.py"),
    "both": (["--passes", "simplify", "--recipe", "r.toml"], "both a recipe and passes"),
    "no-recipe": (["--recipe", "r.toml"], "no such recipe"),
    "off": (["--recipe", "off.toml"], "bisecting is verifying"),
    "stdout": (["-o", "-"], "name repro.onnx"),
    "folder": (["-o", "nowhere/repro.onnx"], "does not exist"),
    "samples-of-nothing": (["--samples", "2"], "--samples"),
    "no-data": (["--data", "nope.npz"], "nope.npz"),
    "npz": (["--passes", "mine.py:leaky", "-o", "repro.npz"], "name it repro.onnx"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, example: Path, untouched: Callable[[Path], AbstractContextManager[None]]) -> None:
    arguments, fragment = BAD[name]
    Path("off.toml").write_text('verify = "off"\n[[pass]]\nuse = "remove-unused"\n')
    with untouched(example):
        ran = run_cli("bisect", GOOD, *arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert fragment in ran.error
