"""The design, held to: imports go one way, files and functions stay short, nothing heavy is imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = sorted(p for p in (ROOT / "graphopt").rglob("*.py") if "passes" not in p.relative_to(ROOT).parts)
PASSES = sorted((ROOT / "passes").glob("*.py"))
TOOLS = sorted(p for p in (ROOT / "tools").rglob("*.py") if ".cache" not in p.parts)

ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "traversal", "residue", "pages"),
    ("sizes",),
    ("user_code", "external", "budgets", "propagation"),
    ("remote",),
    ("structure", "opened", "inline"),
    ("expansion", "schemas"),
    ("costing",),
    ("model",),
    ("spill",),
    ("graph", "storage", "references", "numbering", "common_inputs"),
    ("watching", "lifting", "pieces", "bounds", "aborts"),
    ("cost", "align", "tensors", "surgery", "exporters", "session", "target", "linear"),
    ("isolation", "taps", "package", "data", "difference", "weights", "channels", "concrete_shapes"),
    ("statistics", "timing", "profiling", "validation", "gates", "autodiff", "model_diff", "values"),
    ("observers", "gram", "extraction", "divergence", "workload", "training"),
    ("base", "layerwise", "lifetimes", "scopes", "qdq"),
    ("registry", "foreign", "neighbourhood", "sweeps"),
    ("recipe", "report"),
    ("probes",),
    ("verify",),
    ("ledger",),
    ("manager",),
    ("inspection", "judge"),
    ("linting", "presets", "outcome"),
    ("search",),
    ("stages",),
    ("pipeline",),
    ("sparsified", "transport"),
    ("pruned", "ranking", "bisection", "benchmark", "locking", "compression", "finetuning", "conversion"),
    ("running", "trials", "exporting"),
    ("tuning",),
    ("api",),
    ("drop_in",),
    ("cli",),
    ("__init__", "__main__"),
)
"""A module imports from earlier lines only (what is here and not yet written is the design's)."""

LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
ABOVE_THE_ENGINE = (
    *(
        "search",
        "linting",
        "pipeline",
        "sparsified",
        "pruned",
        "ranking",
        "bisection",
        "benchmark",
        "compression",
        "finetuning",
    ),
    *("trials", "api", "cli"),
)
"""What may know a concrete pass; everything else knows them by name, through the registry."""


def unit(path: Path) -> str:
    """The module or package right under graphopt/ that a file belongs to."""
    return path.relative_to(ROOT / "graphopt").parts[0].removesuffix(".py")


def imported(path: Path, *, types: bool = True) -> Iterator[str]:
    """Full names of the modules a file imports, late ones too, and those for ``types`` only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not types:
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "graphopt" else (module,)


def units(path: Path) -> set[str]:
    """The parts of graphopt that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("graphopt.")}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ENGINE, ids=label)
def test_imports_go_one_way(path: Path) -> None:
    mine = unit(path)
    assert mine in LEVEL or mine in ("demo", "targets"), f"{mine} has no place in ORDER; give it one"
    for other in units(path) - {mine, "passes"}:
        if other.startswith("__"):
            continue
        assert LEVEL[other] < LEVEL.get(mine, len(ORDER)), f"{label(path)} imports {other}, which stands above it"


@pytest.mark.parametrize("path", ENGINE, ids=label)
def test_the_engine_knows_no_concrete_pass(path: Path) -> None:
    assert "passes" not in units(path) or unit(path) in ABOVE_THE_ENGINE


@pytest.mark.parametrize("path", PASSES, ids=label)
def test_a_pass_imports_nothing_above_base_and_no_other_pass(path: Path) -> None:
    for name in imported(path):
        if name.startswith("graphopt.passes"):
            assert name.split(".")[-1].startswith("_"), f"{label(path)} imports another pass, {name}"
        elif name.startswith("graphopt."):
            other = name.split(".")[1]
            assert LEVEL[other] <= LEVEL["base"], f"{label(path)} imports {other}, which stands above base"
        assert name.split(".")[0] != "passes", f"{label(path)}: write graphopt.passes"


@pytest.mark.parametrize(
    ("library", "owner"),
    [("onnx_graphsurgeon", "surgery.py"), ("onnxruntime", "session.py"), ("onnxsim", "simplify.py")],
)
def test_one_file_imports_each_foreign_library(library: str, owner: str) -> None:
    found = {p.name for p in (*ENGINE, *PASSES) if any(n.split(".")[0] == library for n in imported(p, types=False))}
    assert found <= {owner}


def test_passes_is_a_relative_symlink() -> None:
    link = ROOT / "graphopt" / "passes"
    assert link.is_symlink()
    assert str(link.readlink()) == "../passes"


@pytest.mark.parametrize("path", [*ENGINE, *PASSES, *TOOLS], ids=label)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", [*ENGINE, *PASSES], ids=label)
def test_public_names_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name not in ("__init__.py", "__main__.py"):
        assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_file_is_a_drawer() -> None:
    names = {p.stem for p in (*ENGINE, *PASSES, *TOOLS, *(ROOT / "tests").rglob("*.py"))}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


HEAVY = {"onnx", "onnx_ir", "onnxruntime", "scipy", "numpy", "networkx", "sympy", "onnx_graphsurgeon", "onnxscript"}


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import graphopt"], ["-m", "graphopt", "--help"], ["-m", "graphopt", "optimize", "--help"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_early(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "graphopt" in loaded
    assert not loaded & HEAVY
