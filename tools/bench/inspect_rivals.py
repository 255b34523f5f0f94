#!/usr/bin/env python3
"""What ``graphopt inspect``, polygraphy, onnxslim and onnx-tool tell of the same models.

    python tools/bench/inspect_rivals.py --python PYTHON [--models DIR]

PYTHON has the rivals (``python -m venv V; V/bin/pip install polygraphy onnxslim onnx-tool onnxruntime``); nothing is
installed here. DIR holds real models, one a folder (``make models``). Each question has an answer that is computed here
from the file by plain onnx, and a tool tells it where that answer stands in what it prints: no cell is written by hand.
A cell counts the models told of, of those that the question can be asked of.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from inspection import ROOT, everything, measured
from told import HEAVY, QUESTIONS, Model, every, line, one_node, operators, word

# Running


@dataclass
class Tool:
    """A tool's command lines for one model, and for two side by side."""

    name: str
    start: list[str | Path]
    one: Callable[[Model], list[list[str | Path]]]
    heard: dict[str, str] = field(default_factory=dict)


def tools(python: Path) -> list[Tool]:
    there = python.absolute().parent
    ours: list[str | Path] = [sys.executable, "-m", "graphopt", "inspect"]

    def graphopt(m: Model) -> list[list[str | Path]]:
        asked: list[list[str | Path]] = [[], ["-v"], ["--ops"], ["--tree"], ["--nodes"]]
        node = one_node(m)
        return [[*ours, m.path, *more] for more in [*asked, *([["--node", node.name]] if node is not None else [])]]

    def onnx_tool(m: Model) -> list[list[str | Path]]:
        sized = []
        for v in m.inputs:
            kind = onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name
            dims = "x".join(str(d.dim_value or 1) for d in v.type.tensor_type.shape.dim)
            sized.append(f"{v.name}:{kind}:{dims or 1}")
        return [[python, "-m", "onnx_tool", "-i", m.path, "-d", *sized]]

    polygraphy: list[str | Path] = [there / "polygraphy", "inspect", "model"]
    onnxslim: list[str | Path] = [there / "onnxslim", "--inspect"]
    return [
        Tool("graphopt", ours, graphopt),
        Tool("polygraphy", polygraphy, lambda m: [[*polygraphy, m.path, "--show", "layers", "attrs", "weights"]]),
        Tool("onnxslim", onnxslim, lambda m: [[*onnxslim, m.path]]),
        Tool("onnx-tool", [python, "-m", "onnx_tool", "-i"], onnx_tool),
    ]


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def head(first: str, asked: list[Tool]) -> None:
    print()
    row(first, *(t.name for t in asked))
    row("---", *("---" for _ in asked))


def listen(asked: list[Tool], models: list[Model]) -> None:
    """Run everything once, keep what was printed, and show time and memory of the first command of each."""
    head("time, peak memory", asked)
    for model in models:
        cells = []
        for tool in asked:
            first, *others = [measured(command) for command in tool.one(model)]
            tool.heard[model.title] = "\n".join(ran.text for ran in (first, *others) if ran.code == 0)
            why = (first.text.strip().splitlines() or ["killed"])[-1][:50].replace("|", "/")
            cells.append(f"{first.seconds:.1f} s, {first.mb:.0f} MB" if first.code == 0 else f"fails: {why}")
        row(model.title, *cells)


def ask(asked: list[Tool], models: list[Model]) -> bool:
    """The table of what is told; whether the first tool told all."""
    head("told", asked)
    whole = True
    for title, question in QUESTIONS.items():
        answers = {m.title: told for m in models if (told := question(m)) is not None}
        counts = [sum(told(tool.heard[name]) for name, told in answers.items()) for tool in asked]
        missing = [name for name, told in answers.items() if not told(asked[0].heard[name])]
        if missing:
            print(f"{asked[0].name}: {title}: not told of {', '.join(missing)}", file=sys.stderr)
        whole &= not missing and bool(answers)
        row(title, *(f"{n} of {len(answers)}" for n in counts))
    return whole


def behave(asked: list[Tool], models: list[Model], folder: Path) -> None:
    """Two models at once, a model nobody knows the operators of, and files that are none."""
    first, second = models[0], models[1]
    pairs = [(n, max(c), max(second.counts[n])) for n, c in first.counts.items() if n in second.counts and n in HEAVY]
    both = every(*(line(rf"{word(n)}[\s|]+{x}[\s|]+{y}(?!\d)") for n, x, y in pairs))
    ran = [measured([*tool.start, first.path, second.path]) for tool in asked]
    row("two models side by side", *("yes" if r.code == 0 and both(r.text) else "no" for r in ran))
    odd = Model("custom", ROOT / "fixtures" / "models" / "custom.onnx")
    told = operators(odd)
    ran = [measured(tool.one(odd)[0]) for tool in asked]
    row("unknown operators", *("yes" if r.code == 0 and told and told(r.text) else "no" for r in ran))
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes(first.path.read_bytes()[:5000])
    (folder / "text.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("empty", "cut", "text"):
        ran = [measured([*tool.start, folder / f"{name}.onnx"]) for tool in asked]
        plain = [r.code not in (0, 1) and "Traceback" not in r.text and len(r.text.splitlines()) == 1 for r in ran]
        row(f"{name} file: one line, exit code", *("yes" if p else "no" for p in plain))


def main() -> int:
    """Print the tables; 1 where graphopt has a hole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="a Python that has the other tools")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "models", help="real models, one a folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = [Model(n, ROOT / "fixtures" / "models" / f"{n}.onnx") for n in ("shared", "encoder", "control")]
        models += [Model("everything", everything(folder))]
        models += [Model(p.parent.name, p) for p in sorted(options.models.glob("*/model.onnx"))]
        asked = tools(options.python)
        listen(asked, models)
        whole = ask(asked, models)
        behave(asked, models, folder)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
