"""What OpenVINO really does with what `graphopt quantize --target openvino` writes.

    python tools/bench/openvino_check.py [--model rapidocr-cls]... [--openvino-python PYTHON]

For each model and each form of weights (the target's own int8, and uint8 as a control): how many of its layers the CPU
plug-in executes in integers (its own execution graph says so), and how far its outputs lie from ONNX Runtime's on
the same file and from the float model's. OpenVINO runs in the interpreter that is named (default: this one), so that
graphopt's environment need not have it: python -m venv V; V/bin/pip install openvino numpy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from graphopt import data as data_module
from graphopt.model import interface, load
from graphopt.session import Session
from graphopt.target import this_cpu

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("digits", "rapidocr-cls", "rapidocr-rec", "magika", "efficientnet-lite0", "minilm")
SAMPLES = 16  # for calibration; the question here is which kernels run, not how accurate they are
JUDGED = 4

_WORKER = """
import sys, json, numpy as np, openvino as ov
core = ov.Core()
compiled = core.compile_model(core.read_model(sys.argv[1]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
layers = {}
for op in compiled.get_runtime_model().get_ordered_ops():
    info = op.get_rt_info()
    kind, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
    if kind in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
        layers[precision] = layers.get(precision, 0) + 1
feeds = np.load(sys.argv[2])
results = {}
for index in range(int(sys.argv[4])):
    found = compiled({k.split("|")[1]: feeds[k] for k in feeds.files if k.split("|")[0] == str(index)})
    for port, array in found.items():
        results[f"{index}|{port.get_any_name()}"] = array
np.savez(sys.argv[3], **results)
print(json.dumps({"version": ov.__version__, "layers": layers}))
"""


def paths(name: str) -> tuple[Path, Path]:
    """Model and calibration data."""
    if name == "digits":
        return ROOT / "graphopt/demo/digits.onnx", ROOT / "graphopt/demo/calibration.npz"
    folder = ROOT / ".cache/models" / name
    return folder / "model.onnx", folder / "calibration.npz"


def sqnr(reference: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The worst output's, in dB."""
    worst = np.inf
    for name in reference[0]:
        a = np.concatenate([r[name].astype(np.float64).reshape(-1) for r in reference])
        b = np.concatenate([o[name].astype(np.float64).reshape(-1) for o in other])
        noise = float(((a - b) ** 2).sum())
        worst = min(worst, 10 * np.log10(float((a**2).sum()) / noise) if noise else np.inf)
    return worst


def check(name: str, weights: str, python: str, folder: Path) -> str:
    """One row."""
    model, calibration = paths(name)
    target = "openvino" if weights == "s8" else "ort-cpu"
    made = graphopt.quantize(model, data=calibration, samples=SAMPLES, target=target, weights=weights, time=0)
    file = folder / f"{name}.{weights}.onnx"
    made.save(file)
    inputs, _ = interface(load(model))
    dataset = data_module.load_data(calibration, inputs, limit=JUDGED)
    feeds = [data_module.feeds(sample, inputs) for sample in dataset]
    np.savez(folder / "feeds.npz", **{f"{i}|{k}": v for i, feed in enumerate(feeds) for k, v in feed.items()})
    (folder / "worker.py").write_text(_WORKER, encoding="utf-8")
    command = [python, folder / "worker.py", file, folder / "feeds.npz", folder / "results.npz", str(len(feeds))]
    ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if ran.returncode:
        return f"{name:20s} {weights:8s} OpenVINO refuses it: {ran.stderr.strip().splitlines()[-1][:80]}"
    told = json.loads(ran.stdout.strip().splitlines()[-1])
    stored = np.load(folder / "results.npz")
    names = {k.split("|")[1] for k in stored.files}
    theirs = [{n: stored[f"{i}|{n}"] for n in names} for i in range(len(feeds))]
    ours = [Session(load(file), threads=1).run(feed) for feed in feeds]
    floats = [Session(load(model), threads=1).run(feed) for feed in feeds]
    layers = told["layers"]
    integer = sum(count for kind, count in layers.items() if kind in ("u8", "i8"))
    return (
        f"{name:20s} {weights:8s} {integer:3d} of {sum(layers.values()):3d} {sqnr(ours, theirs):10.1f}"
        f" {sqnr(floats, theirs):12.1f} {sqnr(floats, ours):12.1f}   {told['version'][:8]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--openvino-python", default=sys.executable)
    options = parser.parse_args()
    print(f"{this_cpu().name}; SQNR in dB, worst output")
    print(f"{'model':20s} {'weights':8s} {'in integers':10s} {'to ORT':>9s} {'to float':>12s} {'ORT to float':>13s}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.model or MODELS:
            for weights in ("s8", "u8"):
                print(check(name, weights, options.openvino_python, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
