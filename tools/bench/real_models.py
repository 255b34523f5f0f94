"""The main job on models that nobody here made, through the command line: metric, size, latency, coverage.

    python tools/bench/real_models.py [--models a,b] [--json] [-- extra graphopt quantize options]

Needs the models and data of ``make models``. Every figure is what ``graphopt quantize --json`` reported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fetch_models import MODELS

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "models"


def quantize(name: str, metric: str, extra: list[str]) -> dict[str, Any]:
    """One model through ``graphopt quantize``; its report, with ``exit_code`` and ``seconds``."""
    folder = CACHE / name
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "graphopt", "quantize", str(folder / "model.onnx")]
        command += ["-o", str(Path(scratch) / "int8.onnx"), "--data", str(folder / "calibration.npz")]
        command += ["--eval-data", str(folder / "evaluation.npz")]
        command += ["--metric", f"{ROOT / 'tools/realdata/metrics.py'}:{metric}", "--threads", "1", "--json", *extra]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr.strip()}
        report["exit_code"] = done.returncode
        report["seconds"] = time.perf_counter() - started
        report["written"] = (Path(scratch) / "int8.onnx").exists()
    return report


def row(name: str, report: dict[str, Any]) -> str:
    """One line of the table."""
    if report.get("metric") is None or report.get("output") is None:
        error = str(report.get("error")).removeprefix("error: ")
        return f"| {name} | exit {report['exit_code']}: {error[:90]} | | | | | | {report['seconds']:.0f} |"
    metric, ratio = report["metric"], report["latency_ratio"]
    metrics = next(e["metrics"] for e in report["ledger"] if e["pass"].startswith("quantize"))
    size = report["output"]["bytes"] / report["input"]["bytes"]
    macs = "?" if metrics.get("macs_percent") is None else f"{metrics['macs_percent']:.0f} %"
    latency = f"{ratio['median']:.2f}" if ratio else "not timed"
    if report["exit_code"]:
        latency += f" (exit {report['exit_code']}: not written)"
    difference = f"{metric['difference']:+.3f} [{metric['low']:+.3f}, {metric['high']:+.3f}]"
    return (
        f"| {name} | {metric['original']:.3f} | {metric['candidate']:.3f} | "
        f"{difference} | {size:.2f} | {latency} | {macs} | {report['seconds']:.0f} |"
    )


def main() -> int:
    """Print the table (Markdown) or, with ``--json``, the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated names (default: all that are fetched)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("extra", nargs="*", help="options for graphopt quantize, after --")
    options = parser.parse_args()
    wanted = options.models.split(",") if options.models else [m.name for m in MODELS]
    metrics = {m.name: m.metric for m in MODELS}
    reports: dict[str, dict[str, Any]] = {}
    for name in wanted:
        if not (CACHE / name / "evaluation.npz").is_file():
            print(f"{name} is not fetched; run: make models", file=sys.stderr)
            continue
        reports[name] = quantize(name, metrics[name], options.extra)
        if not options.json:
            if len(reports) == 1:
                print("| model | float | int8 | difference [95 %] | size | latency | MACs in int8 | seconds |")
                print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
            print(row(name, reports[name]), flush=True)
    if options.json:
        print(json.dumps(reports, indent=2))
    elif reports:
        any_report = next(iter(reports.values()))
        machine = any_report.get("machine", {})
        print(f"\n{machine.get('cpu')}, VNNI: {machine.get('vnni')}, one thread; size and latency are ratios to float")
    return 0


if __name__ == "__main__":
    sys.exit(main())
