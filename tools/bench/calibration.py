#!/usr/bin/env python3
"""What calibration costs beside plain float inference of the same samples, on one core.

    python tools/bench/calibration.py [--models NAME ...] [--samples N] [--rounds N] [--rival] [--json]

A row per model of the cache: seconds of plain inference, the sweep's time per sample as a ratio to it (ranges only,
with histograms, and, set-up included, the Gram matrices of what all layers read), seconds of set-up (loading, measuring
sizes), and the peak memory with 16 and with 512 samples, each measured in a process of its own. ``--rival`` adds ONNX
Runtime's own calibrators on the first ``--rival-samples``.
Everything of one round runs interleaved; a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

DEFAULT = ("rapidocr-det", "rapidocr-rec", "efficientnet-lite0", "basic-pitch", "minilm", "magika")
RIVALS = ("MinMax", "Percentile", "Entropy")


@dataclass
class Row:
    """One model; memory in MB, ``rivals``: method -> {"ratio", "mb"} or {"failed"}."""

    model: str
    samples: int
    values: int
    plain_s: float
    min_max: float
    histogram: float
    gram: float
    setup_s: float
    mb_16: float
    mb_512: float
    rivals: dict[str, dict[str, Any]] = field(default_factory=dict)


class Feeds:
    """``count`` feeds of a data file: its first 16 samples over and over, read anew every time.

    More of them would count the mapped file's pages as memory of the sweep.
    """

    def __init__(self, model: Any, data: Path, count: int) -> None:
        from graphopt.data import load_data
        from graphopt.model import interface

        self.inputs = interface(model)[0]
        self.data = load_data(data, self.inputs).take(16)
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from graphopt.data import feeds

        return (feeds(sample, self.inputs) for sample in islice(cycle(self.data), self.count))


def prepare(source: Path, target: Path) -> list[str]:
    """Write the model as quantization would see it; the values it would calibrate."""
    from graphopt.graph import opset
    from graphopt.manager import PassManager
    from graphopt.model import load
    from graphopt.passes._placement import place
    from graphopt.registry import create
    from graphopt.storage import save
    from graphopt.target import get_target

    model = load(source)
    names = ["fold-constants", "fuse-batchnorm", "remove-unused", "simplify"]
    names = names if opset(model) >= 13 else ["upgrade-opset", *names]
    model = PassManager([create(name, {}) for name in names], verify="off").run(model).model
    save(model, target)
    return sorted({v.name or "" for v in place(model, get_target("ort-cpu")).quantized.values()})


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(name: str, path: Path, data: Path, taps: list[str], samples: int, rounds: int) -> Row:
    """The ratios of one model: the time of the samples past the first, so that loading is told apart."""
    from graphopt.gram import collect_inputs
    from graphopt.linear import form_of
    from graphopt.model import load
    from graphopt.passes._placement import place
    from graphopt.session import Session
    from graphopt.statistics import collect
    from graphopt.target import get_target

    model = load(path)
    feeds = list(Feeds(model, data, samples))
    session = Session(model, threads=1)

    def plain() -> float:
        """Seconds per sample."""
        return timed(lambda: [session.run(feed) for feed in feeds]) / samples

    def sweep(histograms: bool) -> tuple[float, float]:
        """Seconds until the first sample is done, seconds per sample after that."""
        stamps = [time.perf_counter()]
        collect(
            model,
            taps,
            feeds,
            histograms=histograms,
            threads=1,
            progress=lambda _: stamps.append(time.perf_counter()),
        )
        return stamps[1] - stamps[0], (stamps[-1] - stamps[1]) / (samples - 1)

    plain()
    forms = [form for layer in place(model, get_target("ort-cpu")).layers if (form := form_of(layer.node))]
    base, setup, gram = [plain()], [], []
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for histograms in (False, True):
            first, rest = sweep(histograms)
            base.append(plain())
            ratios[histograms].append(rest / ((base[-2] + base[-1]) / 2))
            setup.append(first - base[-1])
        seconds = timed(lambda: collect_inputs(model, forms, feeds, samples=samples, threads=1))
        base.append(plain())
        gram.append(seconds / samples / ((base[-2] + base[-1]) / 2))
    median = statistics.median
    memory = [child("sweep", path, data, taps, count)["mb"] for count in (16, 512)]
    ranges, full = (median(ratios[histograms]) for histograms in (False, True))
    return Row(name, samples, len(taps), samples * median(base), ranges, full, median(gram), median(setup), *memory)


# What runs in a process of its own


def peak_mb() -> float:
    """VmHWM, not getrusage: that one starts at the size of the process we were forked from."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def child(kind: str, path: Path, data: Path, taps: list[str], samples: int) -> dict[str, Any]:
    """``kind``: ``sweep`` or one of :data:`RIVALS`. ``{"failed": why}`` where it did."""
    request = json.dumps([kind, str(path), str(data), taps, samples])
    done = subprocess.run(
        [sys.executable, __file__, "--child", request], capture_output=True, text=True, check=False, timeout=3600
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"failed": lines[-1][:160], "mb": float("nan")}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_child(kind: str, path: Path, data: Path, taps: list[str], samples: int) -> dict[str, Any]:
    from graphopt.model import load
    from graphopt.session import Session
    from graphopt.statistics import collect

    model = load(path)
    if kind == "sweep":
        collect(model, taps, Feeds(model, data, samples), threads=1)
        return {"mb": peak_mb()}
    if hasattr(os, "sched_setaffinity"):  # ONNX Runtime's calibrators take no number of threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    feeds = list(Feeds(model, data, samples))
    session = Session(model, threads=1)
    session.run(feeds[0])
    before = timed(lambda: [session.run(feed) for feed in feeds])
    seconds = rival(kind, path, feeds)
    after = timed(lambda: [session.run(feed) for feed in feeds])
    return {"ratio": 2 * seconds / (before + after), "mb": peak_mb()}


def rival(method: str, path: Path, feeds: list[dict[str, Any]]) -> float:
    """Seconds of ONNX Runtime's calibrator, one sample at a time, from its first request for a sample on."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(feeds)
            self.started = 0.0

        def get_next(self) -> dict[str, Any] | None:
            self.started = self.started or time.perf_counter()
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            str(path),
            ["Conv", "MatMul", "Gemm"],
            str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod[method],
        )
        reader = Reader()
        calibrator.collect_data(reader)
        calibrator.compute_data()
        return time.perf_counter() - reader.started


# The report


def environment() -> dict[str, Any]:
    import numpy as np

    from graphopt.session import runtime_version
    from graphopt.target import this_cpu

    return {"cpu": this_cpu().name, "cores": os.cpu_count(), "onnxruntime": runtime_version(), "numpy": np.__version__}


def show(rows: list[Row], about: dict[str, Any]) -> None:
    print(
        f"{about['cpu']}, {about['cores']} cores (1 used); onnxruntime {about['onnxruntime']}, numpy {about['numpy']}"
    )
    head = f"{'model':20}{'samples':>8}{'values':>7}{'plain s':>9}{'min-max':>9}{'histogram':>10}"
    print(head + f"{'gram':>8}{'set-up s':>9}{'MB @16':>9}{'MB @512':>9}{'growth':>8}")
    for r in rows:
        line = (
            f"{r.model:20}{r.samples:8}{r.values:7}{r.plain_s:9.2f}{r.min_max:8.2f}x{r.histogram:9.2f}x{r.gram:7.2f}x"
        )
        print(line + f"{r.setup_s:9.2f}{r.mb_16:9.0f}{r.mb_512:9.0f}{r.mb_512 / r.mb_16 - 1:8.1%}")
        for method, found in r.rivals.items():
            told = found.get("failed") or f"{found['ratio']:.1f}x, {found['mb']:.0f} MB"
            print(f"    onnxruntime {method}: {told}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "models")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival", action="store_true", help="ONNX Runtime's calibrators too")
    parser.add_argument("--rival-samples", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        kind, path, data, taps, samples = json.loads(options.child)
        print(json.dumps(run_child(kind, Path(path), Path(data), taps, samples)))
        return 0
    if options.samples < 2 or options.rounds < 1:
        parser.error("--samples must be at least 2 and --rounds at least 1")
    rows = []
    for name in options.models:
        source, data = options.cache / name / "model.onnx", options.cache / name / "calibration.npz"
        if not (source.is_file() and data.is_file()):
            parser.error(f"no model '{name}' with data in {options.cache}; run tools/fetch_models.py --data {name}")
        print(f"{name} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            taps = prepare(source, path)
            row = measure(name, path, data, taps, options.samples, options.rounds)
            if options.rival:
                row.rivals = {m: child(m, path, data, taps, options.rival_samples) for m in RIVALS}
        rows.append(row)
    about = environment()
    if options.json:
        print(json.dumps({"schema_version": 1, **about, "rows": [asdict(r) for r in rows]}, indent=2))
    else:
        show(rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
