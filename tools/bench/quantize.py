"""`graphopt quantize` beside the other quantizers, on real models: same data, same runtime, one run.

    python tools/bench/quantize.py [--models a,b] [--tools graphopt,ort-dynamic,...] [--nncf-python PYTHON] [--json]

Every tool makes its file in a process of its own, with one thread where it can be told, from the same calibration
samples fed one at a time: that gives its time (as a ratio to plain float inference of these samples; graphopt's is the
whole of ``graphopt quantize``, verifying, timing and searching included) and its peak memory; one that needs more than
``--memory-gb``, or ``--timeout`` seconds, has failed. Then all files of a model are judged on the same evaluation
samples (the task metric, and a paired 95 % interval of the difference to float) and timed interleaved with the float
model. NNCF runs in an interpreter that has it: python -m venv V; V/bin/pip install nncf onnxruntime.

A latency below another's means something only on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

CACHE = ROOT / ".cache" / "models"
METRICS = ROOT / "tools" / "realdata" / "metrics.py"
METHODS = ("MinMax", "Entropy", "Percentile")
TYPES = ("u8u8", "u8s8-rr", "s8s8")
NNCF = ("nncf-mixed", "nncf-accurate")
HALF = 50.0
"""Percent of the MACs in int8 below which graphopt's row names its float layers."""

TOOLS = ("graphopt", *(f"ort-{m}-{t}" for m in METHODS for t in TYPES), "ort-dynamic", *NNCF)


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


# What runs in a process of its own. It must not import graphopt: NNCF's interpreter has none.


def read_feeds(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_feeds` wrote."""
    with np.load(path) as stored:
        found: dict[int, dict[str, Any]] = {}
        for key in stored.files:
            index, _, name = key.partition("|")
            found.setdefault(int(index), {})[name] = stored[key]
    return [found[index] for index in sorted(found)]


def peak_mb() -> float:
    """VmHWM, not getrusage: that one starts at the size of the process we were forked from."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM:")), float("nan"))


def work(tool: str, model: str, feeds: str, target: str, memory_gb: float) -> dict[str, Any]:
    """Make one file; seconds and peak memory."""
    if memory_gb > 0 and sys.platform == "linux":
        import resource

        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if hasattr(os, "sched_setaffinity"):  # not all of them take a number of threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    samples = read_feeds(Path(feeds))
    started = time.perf_counter()
    if tool == "ort-dynamic":
        _ort_dynamic(model, target)
    elif tool in NNCF:
        _nncf(model, samples, target, accurate=tool == "nncf-accurate")
    else:
        _, method, types = tool.split("-", 2)
        _ort_static(model, samples, target, method, types)
    return {"seconds": time.perf_counter() - started, "mb": peak_mb()}


def _prepared(model: str, folder: str) -> str:
    """As ONNX Runtime's documentation asks before quantizing; the model itself where that fails. Scales per channel
    need opset 13, which its quantizer warns of and leaves to the user."""
    import onnx
    from onnx import version_converter
    from onnxruntime.quantization.shape_inference import quant_pre_process

    loaded = onnx.load(model)
    if next((o.version for o in loaded.opset_import if o.domain in ("", "ai.onnx")), 13) < 13:
        model = str(Path(folder) / "upgraded.onnx")
        onnx.save(version_converter.convert_version(loaded, 17), model)
    target = str(Path(folder) / "prepared.onnx")
    try:
        quant_pre_process(model, target, skip_symbolic_shape=False)
    except Exception:  # symbolic shape inference gives up on some models; the documentation says to leave it out then
        try:
            quant_pre_process(model, target, skip_symbolic_shape=True)
        except Exception:  # then quantizing gets what there is
            return model
    return target


def _ort_static(model: str, samples: list[dict[str, Any]], target: str, method: str, types: str) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder:
        quantize_static(
            _prepared(model, folder),
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=types.endswith("rr"),
            activation_type=QuantType.QInt8 if types == "s8s8" else QuantType.QUInt8,
            weight_type=QuantType.QUInt8 if types == "u8u8" else QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )


def _ort_dynamic(model: str, target: str) -> None:
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(_prepared(model, folder), target, per_channel=True)


def _nncf(model: str, samples: list[dict[str, Any]], target: str, *, accurate: bool) -> None:
    import nncf
    import onnx

    made = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        fast_bias_correction=not accurate,
    )
    onnx.save(made, target)


# The parent


def made_by(tool: str, model: Path, data: Path, feeds: Path, target: Path, options: Any) -> dict[str, Any]:
    """One tool's file at ``target``: ``{"seconds", "mb"}``, of graphopt the ``report`` too, or ``{"failed": why}``."""
    if tool == "graphopt":
        command = [sys.executable, __file__, "--graphopt", str(model), str(data), str(target)]
    else:
        python = options.nncf_python if tool in NNCF else sys.executable
        request = [tool, str(model), str(feeds), str(target), options.memory_gb]
        command = [python, __file__, "--work", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {options.timeout} s"}
    if done.returncode or not target.exists():
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"failed": lines[-1][:120]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def graphopt_work(model: str, data: str, target: str) -> dict[str, Any]:
    """``graphopt quantize`` with no further option but one thread, timing included."""
    import graphopt

    started = time.perf_counter()
    result = graphopt.quantize(model, data=data, threads=1)
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


def compared(name: str, metric: str, tools: Sequence[str], options: Any) -> list[Row]:
    """All tools on one model."""
    folder = CACHE / name
    model, data = folder / "model.onnx", folder / "calibration.npz"
    rows = [Row(name, tool) for tool in ("float", *tools)]
    with tempfile.TemporaryDirectory() as scratch:
        feeds = Path(scratch) / "feeds.npz"
        write_feeds(model, data, feeds)
        plain = plain_seconds(model, feeds)
        files = {"float": model}
        for row in rows[1:]:
            print(f"{name}: {row.tool}", file=sys.stderr, flush=True)
            target = Path(scratch) / f"{row.tool}.onnx"
            found = made_by(row.tool, model, data, feeds, target, options)
            row.failed = found.get("failed")
            if row.failed is None:
                files[row.tool] = target
                row.calibration, row.mb = found["seconds"] / plain, found["mb"]
                row.macs, row.weights = found.get("macs"), found.get("weights")
                row.floats = found.get("floats", [])
                row.size = target.stat().st_size / model.stat().st_size
        judge(rows, files, folder / "evaluation.npz", metric, options)
    return rows


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


def judge(rows: Sequence[Row], files: dict[str, Path], evaluation: Path, metric: str, options: Any) -> None:
    """The metric and its interval, and the times of all files that run, interleaved."""
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
    if options.time > 0 and len(sessions) > 1:
        _, ratios = time_models(sessions, fed[:4], seconds=options.time * len(sessions))
        for row in rows:
            row.latency = ratios.get(row.tool)


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
    parser.add_argument("--tools", help=f"comma-separated, of {', '.join(TOOLS)} (default: all; NNCF where it is)")
    parser.add_argument("--nncf-python", metavar="PYTHON", help="an interpreter that has nncf and onnxruntime")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="what a rival may take (default %(default)s)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a tool may take (default %(default)s)")
    parser.add_argument("--time", type=float, default=3.0, help="seconds of timing per file (0: none)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--graphopt", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work or options.graphopt:
        done = work(*json.loads(options.work)) if options.work else graphopt_work(*options.graphopt)
        print(json.dumps(done))
        return 0
    tools = options.tools.split(",") if options.tools else [t for t in TOOLS if t not in NNCF or options.nncf_python]
    unknown = [tool for tool in tools if tool not in TOOLS] + [
        t for t in tools if t in NNCF and not options.nncf_python
    ]
    if unknown:
        parser.error(f"{unknown[0]}: no such tool, or NNCF without --nncf-python")
    from fetch_models import MODELS

    wanted = options.models.split(",") if options.models else [model.name for model in MODELS]
    rows: list[Row] = []
    for model in MODELS:
        if model.name in wanted and (CACHE / model.name / "evaluation.npz").is_file():
            rows += compared(model.name, model.metric, tools, options)
    print(json.dumps([asdict(row) for row in rows], indent=2) if options.json else table(rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
