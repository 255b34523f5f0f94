"""What ``graphopt compress`` takes and gives: size, numbers and time per format on real models; memory on a large one.

    python tools/bench/compress.py models minilm rapidocr-rec basic-pitch      one table
    python tools/bench/compress.py large --size 2GB --weights int4             peak memory and time, beside the roof
    python tools/bench/compress.py large --size 8GB --weights int4 --beside    and beside ONNX Runtime's own tool

``large`` makes a synthetic decoder (tools/decoder.py) in --folder, compresses it in a process of its own and takes it
away again. Its roof is the time to read the bytes once, to write the result once, and the arithmetic of rounding (on
data in memory, by the same code). Peak memory is the process's high-water mark of resident memory, mapped pages
included. ONNX Runtime's MatMulNBitsQuantizer (``--beside``) rounds the same model with the same block size, and half of
it where it fails; it may take ``--allowed`` of memory, so that the machine's other work goes on.
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
WITH_DATA = ("int4 with data", "uint4 with data", "fp16-compute")
"""What needs calibration data, or is better for it."""
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

_RIVAL = """
import json, logging, resource, sys, time
limit = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
started = time.perf_counter()
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
logging.disable(logging.CRITICAL)
how = json.loads(sys.argv[3])
made = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), block_size=how["block"], is_symmetric=how["weights"] == "int4")
made.process()
made.model.save_model_to_file(sys.argv[2], use_external_data_format=True)
took = time.perf_counter() - started
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps({"seconds": took, "peak": int(status["VmHWM"].split()[0]) * 1024}))
"""


def models(names: list[str], formats: list[str], seconds: float, samples: int | None) -> None:
    """The table: worst output's SQNR, the real metric, latency on one thread, what the report says of it, and the share
    of bytes that are multiplied as they are stored."""
    import graphopt

    known = {model.name: model.metric for model in MODELS}
    print("| model | format | size | worst output | metric | latency | here it | multiplied packed |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |")
    for name in names:
        folder = ROOT / ".cache" / "models" / name
        for form in formats:
            options: dict[str, Any] = {
                "eval_data": folder / "evaluation.npz",
                "time": seconds,
                "threads": 1,
                "samples": samples,
            }
            if form in WITH_DATA:
                options["data"] = folder / "calibration.npz"
            options["metric"] = f"{ROOT / 'tools' / 'realdata' / 'metrics.py'}:{known[name]}"
            try:
                report = graphopt.compress(folder / "model.onnx", weights=form.split()[0], **options).report
            except graphopt.NothingDone as error:
                print(f"| {name} | {form} | {error} | | | | |", flush=True)
                continue
            print(f"| {name} | {form} | {_row(report)} |", flush=True)


def _row(report: dict[str, Any]) -> str:
    before, after = report["input"]["bytes"], report["output"]["bytes"]
    worst = min((o["sqnr_db"] for o in report["comparison"]["outputs"] if o["sqnr_db"] is not None), default=None)
    metric, speed = report["metric"], report["latency_ratio"]
    found = report["ledger"][-1]["metrics"]
    packed = found.get("bytes_multiplied_packed", 0) / found.get("bytes_before", 1)
    words = {"it runs faster": "runs faster", "it runs slower": "runs slower", "it takes the time": "is as fast"}
    here = next((word for note in report["notes"] for start, word in words.items() if note.startswith(start)), "")
    cells = [
        f"{after / before:.3f}x",
        "exact" if worst is None else f"{worst:.1f} dB",
        "" if metric is None else f"{metric['original']:.4f} -> {metric['candidate']:.4f}",
        "" if speed is None else f"{speed['median']:.2f}x ({speed['low']:.2f} to {speed['high']:.2f})",
        here,
        f"{100 * packed:.0f} %",
    ]
    return " | ".join(cells)


def large(size: int, options: dict[str, Any], folder: Path | None, hidden: int, dtype: str, rival: int) -> None:
    """Peak memory and time on one synthetic decoder; ``rival``: bytes that ONNX Runtime's tool may take, 0: not run."""
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
        while rival and size:
            if beside(source, work / "rival", options, rival):
                break
            size //= 2
            made = decoder.make(source, size, hidden=hidden, dtype=dtype)
    finally:
        shutil.rmtree(work)


def beside(source: Path, folder: Path, options: dict[str, Any], allowed: int) -> bool:
    """ONNX Runtime's own tool on the same file; whether it came to its end."""
    folder.mkdir()
    command = [sys.executable, "-c", _RIVAL, str(source), str(folder / "rival.onnx"), json.dumps(options), str(allowed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    size = in_words(source.with_name("decoder.onnx.data").stat().st_size)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]
        print(f"MatMulNBitsQuantizer on {size}: fails within {in_words(allowed)} ({why})", flush=True)
    else:
        found, made = json.loads(done.stdout.splitlines()[-1]), sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"MatMulNBitsQuantizer on {size}: {found['seconds']:.1f} s, peak memory {in_words(found['peak'])}, ", end=""
        )
        print(f"file {in_words(made)}", flush=True)
    shutil.rmtree(folder)
    return done.returncode == 0


def roof(data: Path, scratch: Path, made: int, options: dict[str, Any], dtype: str) -> tuple[float, float, float]:
    """Seconds to read the weights, to write what they become, and to round them."""
    import onnx_ir as ir

    from graphopt.passes._encode import Encoder
    from graphopt.passes._formats import FORMATS as KNOWN
    from graphopt.passes._layout import Layout

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
    table.add_argument("--formats", default=",".join((*FORMATS, *WITH_DATA)))
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
    big.add_argument("--beside", action="store_true", help="run ONNX Runtime's MatMulNBitsQuantizer too (4 bits)")
    big.add_argument("--allowed", default="12GB", help="memory it may take")
    given = parser.parse_args()
    if given.verb == "models":
        models(given.names, given.formats.split(","), given.time, given.samples)
    else:
        options = {"weights": given.weights, "block": given.block, "rounding": given.rounding}
        rival = parse_size(given.allowed, 1) if given.beside else 0
        large(parse_size(given.size, 1), options, given.folder, given.hidden, given.dtype, rival)


if __name__ == "__main__":
    main()
