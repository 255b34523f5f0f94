"""Gradients over the real models: which have them, what a step takes, and the same step in torch's eager mode.

    python tools/bench/gradients.py                         # coverage and milliseconds
    python tools/bench/gradients.py --torch --models rapidocr-rec,minilm    # in an environment that has torch

The loss is the sum of squares of all float outputs, each element weighted at random; trained is every float weight. A
step is forward and backward on one sample, one thread, the median of interleaved runs. Gradients are compared with
torch's: the largest difference over all weights, each relative to its largest gradient; weights whose gradient is below
1e-5 of the model's largest are left out (they are rounding).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools" / "bench"))

from graphopt.autodiff import differentiate, specialize  # noqa: E402
from graphopt.data import feeds as to_feeds  # noqa: E402
from graphopt.data import load_data  # noqa: E402
from graphopt.errors import GraphoptError  # noqa: E402
from graphopt.model import interface, load  # noqa: E402
from graphopt.passes._shadows import shadow  # noqa: E402
from graphopt.session import Session  # noqa: E402

MODELS = "rapidocr-cls,rapidocr-det,rapidocr-rec,efficientnet-lite0,basic-pitch,magika,minilm,silero-vad,silero-vad-if"


def with_loss(model: onnx.ModelProto, names: list[str], feeds: Any) -> onnx.ModelProto:
    """The weighted sum of squares of these outputs, as the output ``loss``."""
    parts = []
    rng = np.random.default_rng(0)
    sizes = {name: value.size for name, value in Session(model, threads=1).run(feeds, names).items()}
    for name in names:
        weights = rng.uniform(0, 1, sizes[name]).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weights, f"{name}/weights"))
        flat = f"{name}/flat"
        model.graph.initializer.append(numpy_helper.from_array(np.asarray([-1], np.int64), f"{name}/line"))
        model.graph.node.append(helper.make_node("Reshape", [name, f"{name}/line"], [flat]))
        model.graph.node.append(helper.make_node("Mul", [flat, f"{name}/weights"], [f"{name}/weighted"]))
        model.graph.node.append(helper.make_node("MatMul", [f"{name}/weighted", flat], [f"{name}/square"]))
        parts.append(f"{name}/square")
    model.graph.node.append(helper.make_node("Sum", parts, ["loss"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    return model


def measure(name: str, *, rounds: int, compare: bool) -> dict[str, Any]:
    """One model's row."""
    folder = ROOT / ".cache" / "models" / name
    model = load(folder / "model.onnx")
    inputs, outputs = interface(model)
    feeds = to_feeds(next(iter(load_data(str(folder / "calibration.npz"), inputs))), inputs)
    shadows = shadow(model, (), "none")
    variables = {v.name: v.value for v in shadows.variables}
    proto = with_loss(shadows.proto, [o.name for o in outputs if o.dtype == np.float32], feeds)
    row: dict[str, Any] = {"model": name, "nodes": len(proto.graph.node), "variables": len(variables)}
    if not variables:
        return {**row, "stopped": "no weight outside a branch"}
    try:
        started = time.perf_counter()
        concrete = specialize(proto, feeds, list(variables))
        gradients = differentiate(concrete, "loss", [n for n in variables if n in concrete.shapes])
        session = Session(gradients.model, threads=1)
        row["prepare_s"] = time.perf_counter() - started
    except GraphoptError as error:
        return {**row, "stopped": str(error)}
    given = {n: a for n, a in {**feeds, **variables}.items() if n in session.input_names}
    names = list(gradients.of.values())
    found = dict(zip(gradients.of, session.run(given, names).values(), strict=True))
    row |= {"gradients": len(found), "finite": all(np.isfinite(g).all() for g in found.values())}
    contestants: list[Any] = [lambda: session.run(given, names), None]
    if compare:
        import torch
        from torch_eager import Eager

        torch.set_num_threads(1)
        eager = Eager(concrete.model, {n: variables[n] for n in found})
        data = {n: torch.from_numpy(np.array(a)) for n, a in given.items() if n not in variables}
        try:
            theirs = eager.step(data, "loss")
        except Exception as error:  # the interpreter does not know every operator
            return {**row, "torch": f"{type(error).__name__}: {error}"}
        row["difference"] = _difference(found, {n: g.numpy() for n, g in theirs.items() if g is not None})
        contestants[1] = lambda: eager.step(data, "loss")
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, spent in zip(contestants, times, strict=True):
            if run is not None:
                started = time.perf_counter()
                run()
                spent.append(time.perf_counter() - started)
    row["step_ms"] = float(np.median(times[0])) * 1e3
    if times[1]:
        row["torch_ms"] = float(np.median(times[1])) * 1e3
        row["ratio"] = float(np.median(np.asarray(times[0]) / np.asarray(times[1])))
    return row


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    largest = max(float(np.abs(g).max()) for g in theirs.values())
    worst = 0.0
    for name, g in theirs.items():
        size = float(np.abs(g).max())
        if size > 1e-5 * largest:
            worst = max(worst, float(np.abs(mine[name] - g).max()) / size)
    return worst


def main() -> int:
    """Print the table (Markdown) or, with ``--json``, the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch", action="store_true", help="against torch's eager mode")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    if not options.json:
        print("| model | weights | forward and backward | step | torch eager | ratio | largest difference |")
        print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name in options.models.split(","):
        if not (ROOT / ".cache" / "models" / name / "model.onnx").is_file():
            print(f"{name} is not fetched; run: make models", file=sys.stderr)
            continue
        row = measure(name, rounds=options.rounds, compare=options.torch)
        rows.append(row)
        if not options.json:
            works = row.get("stopped") or ("works" if row["gradients"] and row["finite"] else "no gradient")
            cells = [f"{row[k]:{f}}" if k in row else "" for k, f in (("step_ms", ".1f"), ("torch_ms", ".1f"))]
            last = [
                f"{row['ratio']:.2f}" if "ratio" in row else "",
                f"{row['difference']:.1e}" if "difference" in row else "",
            ]
            told = row.get("torch", cells[1])
            print(
                f"| {name} | {row['variables']} | {works} | {cells[0]} ms | {told} | {' | '.join(last)} |", flush=True
            )
    if options.json:
        print(json.dumps({"schema_version": 1, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
