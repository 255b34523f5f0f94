#!/usr/bin/env python3
"""``graphopt optimize`` beside onnxsim, onnxslim and onnxscript's optimizer on the real models.

    python tools/bench/simplifiers.py [--models a,b] [--rival-python PYTHON] [--seconds 10] [--json]

Nodes are those of all graphs, bodies, functions and Constant nodes included. Latency is the median, run by run, of the
time over the original's, all models interleaved in one run on one thread. Wall time and memory (measured.py) are of the
whole command, ours with its end check. ``differs``: outputs against the original's on the evaluation samples, ONNX
Runtime's optimizations off, beyond the original's own noise. Rivals run in ``--rival-python`` with their defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), str(ROOT / "tools")]

RIVALS = {
    "onnxsim": "import onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(source))[0], target)",
    "onnxslim": "import onnxslim; onnxslim.slim(source, target)",
    "onnxscript": (
        "import onnx, onnxscript.optimizer as o; m = onnx.load(source); r = o.optimize(m); "
        "onnx.save(m if r is None else r, target)"
    ),
}
SAMPLES = 8


def command(tool: str, source: Path, target: Path, python: str) -> list[str]:
    """The command line that makes ``target``."""
    if tool == "graphopt":
        return [sys.executable, "-m", "graphopt", "optimize", str(source), "-o", str(target), "--time", "0", "--quiet"]
    return [python, "-c", f"import sys; source, target = sys.argv[1:]; {RIVALS[tool]}", str(source), str(target)]


def count_nodes(proto: Any) -> int:
    """Nodes of all graphs, bodies and functions."""
    from graphopt.model import graphs

    return sum(len(graph.node) for graph in graphs(proto)) + sum(len(f.node) for f in proto.functions)


def difference(path: Path, original: Path, feeds: list[Any], noise: dict[str, float]) -> str | None:
    """Why ``path`` is no exact rewrite of ``original``, or None."""
    from graphopt.errors import GraphoptError
    from graphopt.model import interface, load
    from graphopt.session import Session
    from graphopt.validation import compare_sessions, exact_violation

    try:
        before, after = load(original), load(path)
        sessions = [Session(model, optimize=False, threads=1) for model in (before, after)]
        found = exact_violation(compare_sessions(*sessions, feeds), noise)
    except GraphoptError as error:
        return str(error)[:120]
    return found or (None if interface(before) == interface(after) else "its declared inputs or outputs changed")


def compare(name: str, tools: list[str], python: str, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    import onnx
    from measured import measure

    from graphopt.data import feeds as to_feeds
    from graphopt.data import load_data
    from graphopt.model import interface, load
    from graphopt.session import Session
    from graphopt.timing import time_models
    from graphopt.validation import output_noise

    cache = ROOT / ".cache" / "models" / name
    source = cache / "model.onnx"
    model = load(source)
    inputs = interface(model)[0]
    samples = islice(load_data(cache / "evaluation.npz", inputs), SAMPLES)
    feeds = [to_feeds(sample, inputs) for sample in samples]
    noise = output_noise(model, feeds, threads=1)
    rows: list[dict[str, Any]] = [{"model": name, "tool": "original", "nodes": count_nodes(onnx.load(source))}]
    rows[0]["bytes"] = source.stat().st_size
    sessions = {"original": Session(model, threads=1, timed=True)}
    for tool in tools:
        target = folder / f"{tool}.onnx"
        cost = measure(command(tool, source, target, python), timeout=900)
        row = {"model": name, "tool": tool, "wall_s": cost.wall_s, "mb": cost.rss_mb, "failed": None, "differs": None}
        rows.append(row)
        if not target.exists():
            row["failed"] = f"exit {cost.exit_code}: {cost.error}"
            continue
        row |= {"nodes": count_nodes(onnx.load(target)), "bytes": target.stat().st_size}
        row["differs"] = difference(target, source, feeds, noise)
        if row["differs"] is None or "declared" in row["differs"]:
            sessions[tool] = Session(load(target), threads=1, timed=True)
    if seconds > 0 and len(sessions) > 1:
        _, ratios = time_models(sessions, feeds, seconds=seconds)
        for row in rows[1:]:
            row["latency"] = ratios.get(row["tool"])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One model's rows of the table, ours with what it is behind in."""
    for row in rows:
        latency = (
            f"{row['latency'][0]:.3f} [{row['latency'][1]:.3f}, {row['latency'][2]:.3f}]" if row.get("latency") else ""
        )
        cost = f"{row['wall_s']:.1f} | {row['mb']:.0f}" if "wall_s" in row else " | "
        problem = row.get("failed") or row.get("differs") or (behind(rows) if row["tool"] == "graphopt" else "")
        print(
            f"| {row['model']} | {row['tool']} | {row.get('nodes', '')} | {row.get('bytes', 0) / 1e6:.2f} | "
            f"{latency} | {cost} | {problem} |",
            flush=True,
        )


def behind(rows: list[dict[str, Any]]) -> str:
    """Which rival of correct output leaves fewer nodes, or is faster beyond both intervals."""
    ours = next(row for row in rows if row["tool"] == "graphopt")
    found = []
    for row in rows:
        if row["tool"] in ("original", "graphopt") or row["failed"] or row["differs"] or "nodes" not in ours:
            continue
        if row["nodes"] < ours["nodes"]:
            found.append(f"{row['tool']} has {ours['nodes'] - row['nodes']} nodes fewer")
        if row.get("latency") and ours.get("latency") and row["latency"][2] < ours["latency"][1]:
            found.append(f"{row['tool']} is faster")
    return "; ".join(found)


def main() -> int:
    """Print the table (Markdown) or, with ``--json``, the rows; exit 1 where ours fails, differs or is behind."""
    from fetch_models import MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated names (default: all that are fetched)")
    parser.add_argument("--tools", default=",".join(["graphopt", *RIVALS]))
    parser.add_argument("--rival-python", default=sys.executable, help="the Python that has the rivals installed")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per model; 0: none")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    everything: list[dict[str, Any]] = []
    if not options.json:
        print("| model | tool | nodes | MB | latency | wall s | peak MB | |")
        print("| --- | --- | ---: | ---: | --- | ---: | ---: | --- |")
    for name in options.models.split(",") if options.models else [m.name for m in MODELS]:
        if not (ROOT / ".cache" / "models" / name / "evaluation.npz").is_file():
            print(f"{name} is not fetched; run: make models", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(name, options.tools.split(","), options.rival_python, options.seconds, Path(folder))
        everything += rows
        if not options.json:
            show(rows)
    if options.json:
        print(json.dumps(everything, indent=2))
    ours = [[r for r in everything if r["model"] == name] for name in dict.fromkeys(r["model"] for r in everything)]
    bad = [
        rows for rows in ours for r in rows if r["tool"] == "graphopt" and (r["failed"] or r["differs"] or behind(rows))
    ]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
