"""`graphopt quantize` beside the other quantizers, on real models: same data, same runtime, one run.

    python tools/bench/quantize.py [--models a,b] [--tools graphopt,ort-dynamic,...] [--keep FOLDER [--make]] [--json]

Every tool makes its file in a process of its own, with one thread where it can be told, from the same calibration
samples fed one at a time: that gives its time (as a ratio to plain float inference of these samples; graphopt's is the
whole of ``graphopt quantize``, verifying, timing and searching included) and its peak memory; one that needs more than
``--memory-gb``, or ``--timeout`` seconds, has failed. Then all files of a model are judged on the same evaluation
samples (the task metric, and a paired 95 % interval of the difference to float) and timed interleaved with the float
model. Last, those that stay within 1 % of float's metric race graphopt's: is anybody faster?

``graphopt`` has no further option; ``graphopt-1%`` is told ``--max-drop 1%`` and gets the metric and the evaluation
samples to judge by, as a user with a budget gives them. The rivals are those of quantizers.py, each in the interpreter
``RIVALS/PACKAGE/bin/python`` (``make rivals``); those without one are left out. With ``--keep`` files that are there
are not made again, and ``--make`` stops before judging: what is made on a busy machine can be timed on an idle one.

A latency below another's means something only on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from quantizers import RIVALS, peak_mb, read_feeds

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

CACHE = ROOT / ".cache" / "models"
METRICS = ROOT / "tools" / "realdata" / "metrics.py"
OURS = {"graphopt": None, "graphopt-1%": "1%"}
"""What each is told as ``--max-drop``."""
TOOLS = (*OURS, *RIVALS)
WITHIN = 0.01
"""How far below float's metric, of its value, still counts as doing the job."""
SLOWER = 1.03
"""What ``quantize`` calls slower (:data:`graphopt.judge.SLOWER`)."""
HALF = 50.0
"""Percent of the MACs in int8 below which graphopt's row names its float layers."""


@dataclass
class Row:
    """One file. ``metric`` and its ``difference`` to float with the interval; ``size`` and ``latency`` are ratios to
    float, ``calibration`` the tool's whole time over float inference of the calibration samples, ``mb`` its peak."""

    model: str
    tool: str
    failed: str | None = None
    metric: float | None = None
    difference: tuple[float, float, float] | None = None
    size: float | None = None
    latency: tuple[float, float, float] | None = None
    calibration: float | None = None
    mb: float | None = None
    macs: float | None = None
    weights: float | None = None
    floats: list[str] = field(default_factory=list)


def write_feeds(model: Path, data: Path, target: Path) -> int:
    """The calibration samples as arrays ``index|input``, which every worker reads; how many there are."""
    from graphopt.data import feeds, load_data
    from graphopt.model import interface, load

    inputs, _ = interface(load(model))
    arrays: dict[str, Any] = {}
    count = 0
    for count, sample in enumerate(load_data(data, inputs), 1):
        arrays |= {f"{count - 1}|{name}": array for name, array in feeds(sample, inputs).items()}
    np.savez(target, **arrays)
    return count


def interpreter(tool: str, rivals: Path) -> Path | None:
    """What runs it; None where its package is not installed."""
    package = RIVALS[tool].package if tool in RIVALS else ""
    python = rivals.absolute() / package / "bin" / "python" if package else Path(sys.executable)
    return python if python.is_file() else None


def made_by(tool: str, model: str, metric: str, feeds: Path, target: Path, options: Any) -> dict[str, Any]:
    """One tool's file at ``target``: ``{"seconds", "mb"}`` and of graphopt more, or ``{"failed": why}``."""
    noted = target.with_suffix(".json")
    if noted.is_file():
        kept: dict[str, Any] = json.loads(noted.read_text(encoding="utf-8"))
        return kept
    request = [tool, str(CACHE / model / "model.onnx"), str(feeds), str(target), options.memory_gb]
    command = [str(interpreter(tool, options.rivals)), str(Path(__file__).with_name("quantizers.py"))]
    if tool in OURS:
        command, request = [sys.executable, __file__, "--graphopt"], [tool, model, metric, str(target)]
    try:
        with tempfile.TemporaryDirectory() as here:  # some leave files where they stand
            done = subprocess.run(
                [*command, json.dumps(request)],
                capture_output=True,
                text=True,
                check=False,
                timeout=options.timeout,
                cwd=here,
            )
        found = {"failed": f"exit {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:110]}"}
        if not done.returncode:
            found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"failed": f"more than {options.timeout} s"}
    noted.write_text(json.dumps(found), encoding="utf-8")
    return found


def graphopt_work(tool: str, model: str, metric: str, target: str) -> dict[str, Any]:
    """``graphopt quantize``, one thread, timing included."""
    import graphopt

    folder = CACHE / model
    asked: dict[str, Any] = {"data": folder / "calibration.npz", "threads": 1}
    if OURS[tool]:
        asked |= {"metric": f"{METRICS}:{metric}", "eval_data": folder / "evaluation.npz", "max_drop": OURS[tool]}
    started = time.perf_counter()
    result = graphopt.quantize(folder / "model.onnx", **asked)
    result.save(target)
    seconds = time.perf_counter() - started
    entry = next(e for e in result.report["ledger"] if e["pass"] == "quantize-static")
    metrics = entry["metrics"]
    return {
        "seconds": seconds,
        "mb": peak_mb(),
        "macs": metrics.get("macs_percent"),
        "weights": metrics.get("weight_bytes_percent"),
        "floats": [f"{skip['site']}: {skip['reason']}" for skip in entry["skipped"]],
    }


def compared(name: str, metric: str, tools: Sequence[str], options: Any) -> tuple[list[Row], str]:
    """All tools on one model, and who is fastest of those that do the job."""
    folder = CACHE / name
    model, data = folder / "model.onnx", folder / "calibration.npz"
    rows = [Row(name, tool) for tool in ("float", *tools)]
    with tempfile.TemporaryDirectory() as scratch:
        kept = (options.keep or Path(scratch)).absolute() / name
        kept.mkdir(parents=True, exist_ok=True)
        feeds = Path(scratch) / "feeds.npz"
        write_feeds(model, data, feeds)
        plain = plain_seconds(model, feeds)
        files = {"float": model}
        for row in rows[1:]:
            print(f"{name}: {row.tool}", file=sys.stderr, flush=True)
            target = kept / f"{row.tool}.onnx"
            found = made_by(row.tool, name, metric, feeds, target, options)
            row.failed = found.get("failed")
            if row.failed is None and not has_integers(target):
                row.failed = "it made a file in which nothing is in integers"
            if row.failed is None:
                files[row.tool] = target
                row.calibration, row.mb = found["seconds"] / plain, found["mb"]
                row.macs, row.weights = found.get("macs"), found.get("weights")
                row.floats = found.get("floats", [])
                row.size = target.stat().st_size / model.stat().st_size
        verdict = "" if options.make else judge(rows, files, folder / "evaluation.npz", metric, options)
    return rows, verdict


def has_integers(path: Path) -> bool:
    """Whether anything in the file is quantized."""
    import onnx

    from graphopt.model import graphs

    found = {node.op_type for graph in graphs(onnx.load(path)) for node in graph.node}
    return any(name in op_type for op_type in found for name in ("QuantizeLinear", "Integer", "QLinear"))


def plain_seconds(model: Path, feeds: Path) -> float:
    """Float inference of the calibration samples, one thread."""
    from graphopt.model import load
    from graphopt.session import Session

    session, samples = Session(load(model), threads=1), read_feeds(feeds)
    session.run(samples[0])
    started = time.perf_counter()
    for sample in samples:
        session.run(sample)
    return time.perf_counter() - started


def judge(rows: Sequence[Row], files: dict[str, Path], evaluation: Path, metric: str, options: Any) -> str:
    """The metric and its interval, the times of all files that run, interleaved, and :func:`verdict`."""
    from graphopt.data import feeds, labels, load_data
    from graphopt.errors import GraphoptError
    from graphopt.gates import load_metric, measure
    from graphopt.model import interface, load
    from graphopt.session import Session
    from graphopt.timing import time_models

    inputs, _ = interface(load(files["float"]))
    samples = list(load_data(evaluation, inputs))
    fed = [feeds(sample, inputs) for sample in samples]
    labelled = [{**feed, **labels(sample, inputs)} for feed, sample in zip(fed, samples, strict=True)]
    judged = load_metric(f"{METRICS}:{metric}")
    sessions: dict[str, Session] = {}
    before: list[dict[str, Any]] = []
    for row in (row for row in rows if row.tool in files):
        try:
            session = Session(load(files[row.tool]), threads=1, timed=True)
            outputs = [session.run(feed) for feed in fed]
        except GraphoptError as error:
            row.failed = f"its file does not run: {error}"[:120]
            continue
        before = before or outputs
        result = measure(judged, before, outputs, labelled)
        row.metric, row.difference = result.candidate, (result.difference, result.low, result.high)
        sessions[row.tool] = session
    if options.time <= 0 or len(sessions) < 2:
        return ""
    _, ratios = time_models(sessions, fed[:4], seconds=options.time * len(sessions))
    for row in rows:
        row.latency = ratios.get(row.tool)
    final = finalists(rows)
    if len(final) < 2:
        return verdict(rows, {})
    _, ratios = time_models({tool: sessions[tool] for tool in final}, fed[:4], seconds=4 * options.time * len(final))
    return verdict(rows, ratios)


def finalists(rows: Sequence[Row]) -> list[str]:
    """Float, ours and the two fastest rivals of those that do the job and are timed."""
    fit = [row for row in rows if row.metric is not None and row.metric >= rows[0].metric * (1 - WITHIN)]  # type: ignore[operator]
    rivals = sorted((row for row in fit if row.tool in RIVALS and row.latency), key=lambda row: row.latency or (9.0,))
    return [row.tool for row in fit if row.tool == "float" or row.tool in OURS] + [row.tool for row in rivals[:2]]


def verdict(rows: Sequence[Row], ratios: dict[str, tuple[float, float, float]]) -> str:
    """Who is faster, graphopt or the fastest rival, of those within 1 % of float's metric, in a race of their own.

    Where graphopt hands nothing over (exit 3) its user has the float model.
    """
    told = {tool: "{:.3f} ({:.3f} to {:.3f})".format(*ratio) for tool, ratio in ratios.items()}
    ours = min((tool for tool in ratios if tool in OURS), key=ratios.__getitem__, default="float")
    rival = min((tool for tool in ratios if tool in RIVALS), key=ratios.__getitem__, default="float")
    best, limit = ratios.get(ours, (1.0, 1.0, 1.0)), min(SLOWER, ratios.get(rival, (9.0, 9.0, 9.0))[2])
    answer = "ok" if best[1] <= limit else "BEHIND"
    beside = f"{rival} {told[rival]}" if rival in told else "none does the job"
    return f"| {rows[0].model} | {ours} {told.get(ours, '1')} | {beside} | {answer} |"


def table(rows: Sequence[Row]) -> str:
    """Markdown, and below it the float layers of graphopt's rows that hold less than half of the MACs in int8."""
    lines = [
        "| model | tool | metric | to float [95 %] | size | latency | calibration | MB | MACs, weights in int8 |",
        "| --- | --- | ---: | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        start = f"| {row.model} | {row.tool} |"
        if row.failed is not None:
            lines.append(f"{start} failed: {row.failed.replace('|', '/')} | | | | | | |")
            continue
        metric = "" if row.metric is None else f"{row.metric:.3f}"
        if row.tool == "float":
            lines.append(f"{start} {metric} | | 1 | 1 | | | |")
            continue
        assert row.difference is not None
        told = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.difference)
        latency = "" if row.latency is None else "{:.2f} ({:.2f} to {:.2f})".format(*row.latency)
        share = "" if row.macs is None else f"{row.macs:.0f} %, {row.weights or 0:.0f} %"
        lines.append(f"{start} {metric} | {told} | {row.size:.2f} | {latency} | {row.calibration:.1f}x "
                     f"| {row.mb:.0f} | {share} |")  # fmt: skip
    for row in rows:
        if row.macs is not None and row.macs < HALF:
            lines += ["", f"{row.model}, in float ({row.macs:.0f} % of the MACs are in int8):", ""]
            lines += [f"* {one}" for one in row.floats]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or with ``--json`` the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help="comma-separated names (default: all that are fetched)")
    parser.add_argument("--tools", help=f"comma-separated, of {', '.join(TOOLS)} (default: those installed)")
    parser.add_argument("--rivals", type=Path, default=ROOT / ".rivals", help="environments (default %(default)s)")
    parser.add_argument("--keep", type=Path, help="where made files stay, and are found again")
    parser.add_argument("--make", action="store_true", help="make the files, and judge none (needs --keep)")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="what a rival may take (default %(default)s)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a tool may take (default %(default)s)")
    parser.add_argument("--time", type=float, default=3.0, help="seconds of timing per file (0: none)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--graphopt", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.graphopt:
        print(json.dumps(graphopt_work(*json.loads(options.graphopt))))
        return 0
    asked = options.tools.split(",") if options.tools else TOOLS
    unknown = [tool for tool in asked if tool not in TOOLS]
    if unknown:
        parser.error(f"{unknown[0]}: no such tool")
    if options.make and not options.keep:
        parser.error("--make needs --keep FOLDER")
    tools = [tool for tool in asked if interpreter(tool, options.rivals)]
    for package in sorted({RIVALS[tool].package for tool in asked if tool not in tools}):
        print(f"{package} is left out: no {options.rivals / package}/bin/python; make rivals", file=sys.stderr)
    from fetch_models import MODELS

    wanted = options.models.split(",") if options.models else [model.name for model in MODELS]
    rows: list[Row] = []
    verdicts = ["", "| model | graphopt | the fastest rival within 1 % of float | |", "| --- | --- | --- | --- |"]
    for model in MODELS:
        if model.name in wanted and (CACHE / model.name / "evaluation.npz").is_file():
            found, answer = compared(model.name, model.metric, tools, options)
            rows += found
            verdicts += [answer] if answer else []
    if not options.make:
        told = table(rows) + "\n" + ("\n".join(verdicts) if len(verdicts) > 3 else "")
        print(json.dumps([asdict(row) for row in rows], indent=2) if options.json else told)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
