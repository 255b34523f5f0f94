"""What ``graphopt compress`` takes and gives: size, numbers and time per format on real models; memory on a large one.

    python tools/bench/compress.py models minilm rapidocr-rec basic-pitch      one table
    python tools/bench/compress.py large --size 2GB --weights int4             peak memory and time, beside the roof

``large`` makes a synthetic decoder (tools/decoder.py) in --folder, compresses it in a process of its own and takes it
away again. Its roof is the time to read the bytes once, to write the result once, and the arithmetic of rounding (on
data in memory, by the same code). Peak memory is the process's high-water mark of resident memory, mapped pages
included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from graphopt.gates import parse_size  # noqa: E402
from graphopt.report.units import size as in_words  # noqa: E402
from tools import decoder  # noqa: E402
from tools.fetch_models import MODELS  # noqa: E402

FORMATS = ("fp16", "bf16", "int8", "int8-block", "int4", "uint4", "palette8", "palette4")
_CHILD = """
import json, sys, time
started = time.perf_counter()
import graphopt
result = graphopt.compress(sys.argv[1], time=0, **json.loads(sys.argv[3]))
result.save(sys.argv[2])
took = time.perf_counter() - started
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"seconds": took, "peak": peak, "bytes": result.report["output"]["bytes"],
                  "db": result.report["ledger"][-1]["metrics"]["weight_sqnr_db"]}))
"""


def models(names: list[str], formats: list[str], data: bool, seconds: float, samples: int | None) -> None:
    """The table: worst output's SQNR, the real metric, latency on one thread, and the share of bytes that are
    multiplied as they are stored."""
    import graphopt

    known = {model.name: model.metric for model in MODELS}
    print("| model | format | size | output SQNR | metric | latency | multiplied packed |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in names:
        folder = ROOT / ".cache" / "models" / name
        for form in formats:
            options: dict[str, Any] = {
                "eval_data": folder / "evaluation.npz",
                "time": seconds,
                "threads": 1,
                "samples": samples,
            }
            if data:
                options["data"] = folder / "calibration.npz"
            metric = f"{ROOT / 'tools' / 'realdata' / 'metrics.py'}:{known[name]}"
            try:
                report = graphopt.compress(folder / "model.onnx", weights=form, metric=metric, **options).report
            except graphopt.NothingDone as error:
                print(f"| {name} | {form} | {error} | | | | |", flush=True)
                continue
            print(f"| {name} | {form} | {_row(report)} |", flush=True)


def _row(report: dict[str, Any]) -> str:
    before, after = report["input"]["bytes"], report["output"]["bytes"]
    worst = min((o["sqnr_db"] for o in report["comparison"]["outputs"] if o["sqnr_db"] is not None), default=None)
    metric, speed = report["metric"], report["latency_ratio"]
    found = next(e["metrics"] for e in report["ledger"] if e["pass"] == "compress-weights")
    packed = found["bytes_multiplied_packed"] / found["bytes_before"]
    cells = [
        f"{after / before:.3f}x",
        "exact" if worst is None else f"{worst:.1f} dB",
        "" if metric is None else f"{metric['original']:.4f} -> {metric['candidate']:.4f}",
        "" if speed is None else f"{speed['median']:.2f}x ({speed['low']:.2f} to {speed['high']:.2f})",
        f"{100 * packed:.0f} %",
    ]
    return " | ".join(cells)


def large(size: int, options: dict[str, Any], folder: Path | None, hidden: int, dtype: str) -> None:
    """Peak memory and time on one synthetic decoder."""
    work = Path(tempfile.mkdtemp(prefix="graphopt-decoder-", dir=folder))
    try:
        source, target = work / "decoder.onnx", work / "small.onnx"
        made = decoder.make(source, size, hidden=hidden, dtype=dtype)
        print(f"{in_words(made)} of weights ({dtype}), hidden size {hidden}: {options}")
        read, write, rounding = roof(source.with_name("decoder.onnx.data"), work / "scratch", made, options, dtype)
        command = [sys.executable, "-c", _CHILD, str(source), str(target), json.dumps({**options, "memory": 1})]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout)
        total = read + write + rounding
        print(f"roof: read {read:.1f} s, write {write:.1f} s, rounding {rounding:.1f} s: {total:.1f} s")
        print(f"graphopt: {found['seconds']:.1f} s ({found['seconds'] / total:.2f} of it)")
        print(f"peak memory {in_words(found['peak'])}; size {found['bytes'] / made:.4f}x; weights to {found['db']} dB")
    finally:
        shutil.rmtree(work)


def roof(data: Path, scratch: Path, made: int, options: dict[str, Any], dtype: str) -> tuple[float, float, float]:
    """Seconds to read the weights, to write what they become, and to round them."""
    import onnx_ir as ir

    from graphopt.passes._encode import Encoder, Layout
    from graphopt.passes._formats import FORMATS as KNOWN

    started = time.perf_counter()
    with data.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass
    read = time.perf_counter() - started
    form = KNOWN[options["weights"]]
    block = int(options.get("block", 64))
    shape = (2048, 8192)
    layout = Layout(
        form, shape, shape[1], shape[0], block if form.blocked else shape[0], flipped=True, turned=not form.whole
    )
    if form.whole:
        layout = Layout(form, shape, shape[0], shape[1], shape[1])
    tensor = ir.tensor(np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype))
    encoder = Encoder(lambda: None, lambda _: None)  # type: ignore[arg-type, return-value]
    started = time.perf_counter()
    encoder.encode(tensor, layout, fitted=options.get("rounding") != "nearest" and form.bits == 4)
    rounding = (time.perf_counter() - started) * made / tensor.nbytes
    piece = np.zeros(1 << 24, np.uint8)
    left = int(layout.stored_bytes * made / tensor.nbytes)
    started = time.perf_counter()
    with scratch.open("wb") as stream:
        while left > 0:
            stream.write(piece[: min(left, len(piece))].data)
            left -= len(piece)
        stream.flush()
    write = time.perf_counter() - started
    scratch.unlink()
    return read, write, rounding


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    table = verbs.add_parser("models")
    table.add_argument("names", nargs="+")
    table.add_argument("--formats", default=",".join(FORMATS))
    table.add_argument("--data", action="store_true", help="round to what layers read in calibration data")
    table.add_argument("--time", type=float, default=2.0)
    table.add_argument("--samples", type=int, help="calibration and evaluation samples (default all)")
    big = verbs.add_parser("large")
    big.add_argument("--size", default="2GB")
    big.add_argument("--weights", default="int4", choices=FORMATS)
    big.add_argument("--block", type=int, default=64)
    big.add_argument("--rounding", default="auto")
    big.add_argument("--hidden", type=int, default=2048)
    big.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    big.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.verb == "models":
        models(given.names, given.formats.split(","), given.data, given.time, given.samples)
    else:
        options = {"weights": given.weights, "block": given.block, "rounding": given.rounding}
        large(parse_size(given.size, 1), options, given.folder, given.hidden, given.dtype)


if __name__ == "__main__":
    main()
