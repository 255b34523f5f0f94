"""What finetune wins back: int8 models whose weights are cut to fewer bits, trained on what the float model says.

    python tools/bench/finetune.py                                   # the demo's digits
    python tools/bench/finetune.py --models rapidocr-rec --bits 4 --steps 80 --batch 4
    python tools/bench/finetune.py --write student.onnx --bits 3     # only make the student
    python tools/bench/finetune.py --models minilm --macs 0.7        # pruned instead: to 0.7 of its MACs, in float
    python tools/bench/finetune.py --models minilm --layers 0,2,4    # without its other layers, in float

Activations stay uint8, or get ``--activations`` 4 bits. Scales of narrow weights and activations are those of least
squared error, of weights per channel or (``--per-tensor``) one for all. Training sees ``calibration.npz`` without
labels (or ``--train 400`` new samples of the same kind), the metric is taken on ``evaluation.npz``. ``--match``: the
inner layers of MiniLM's student learn from the teacher's, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

from fetch_models import MODELS  # noqa: E402

import graphopt  # noqa: E402
from graphopt.data import feeds, load_data  # noqa: E402
from graphopt.errors import GraphoptError, NothingDone  # noqa: E402
from graphopt.graph import constant_array  # noqa: E402
from graphopt.model import interface, load  # noqa: E402
from graphopt.passes._shadows import set_constant  # noqa: E402
from graphopt.qdq import is_dq, is_q, parameters  # noqa: E402
from graphopt.session import Session  # noqa: E402

_LAYERS = 6
_LAYER = "/encoder/encoder/layer.{}/output/LayerNorm/LayerNormalization_output_0"


def narrow(model: ir.Model, bits: int, *, per_tensor: bool = False) -> ir.Model:
    """Round the int8 weights of a QDQ model again, to ``bits``; biases follow. The model is changed and returned."""
    largest = 2 ** (bits - 1) - 1
    found = [(n, q, p) for n in model.graph if is_dq(n) and (p := parameters(n)) and (q := _stored(n)) is not None]
    for node, stored, form in found:
        if form.kind == "int32" or node.inputs[1] is None or node.inputs[0] is None:
            continue
        axis = form.axis % stored.ndim
        line = [-1 if i == axis else 1 for i in range(stored.ndim)] if form.scale.size > 1 else []
        zero = form.zero.reshape(line)
        weight = (stored.astype(np.float64) - zero) * form.scale.reshape(line)
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        rows = rows if not per_tensor and form.scale.size > 1 else rows.reshape(1, -1)
        scale = np.broadcast_to(_least_error(rows, largest), (max(form.scale.size, 1),)).astype(np.float32)
        scale = np.maximum(scale, form.scale.reshape(-1))  # below it a bias would not fit into int32
        whole = np.clip(np.rint(weight / scale.reshape(line)), -largest, largest)
        set_constant(node.inputs[0], (whole + zero).astype(stored.dtype))
        set_constant(node.inputs[1], scale.reshape(form.scale.shape))
    for node, stored, form in found:
        if form.kind != "int32" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        layer = next(iter(node.outputs[0].uses())).node
        if layer.op_type == "Add":  # behind a MatMul: the runtime makes one Gemm of the two
            other = next(v for v in layer.inputs if v is not node.outputs[0])
            producer = other.producer() if other is not None else None
            assert producer is not None
            layer = producer
        ends = [v.producer() for v in layer.inputs[:2] if v is not None]
        scales = [p.scale.reshape(-1) for end in ends if end is not None and (p := parameters(end)) is not None]
        product = (scales[0] * scales[1]).astype(np.float32)
        real = stored.astype(np.float64) * form.scale
        set_constant(node.inputs[0], np.rint(real / product).astype(np.int32))
        set_constant(node.inputs[1], product.reshape(form.scale.shape))
    return model


def narrow_activations(model: ir.Model, samples: list[dict[str, Any]]) -> ir.Model:
    """Hold the uint8 activations of a QDQ model to 16 levels, by a Clip in front: what ONNX Runtime makes
    of uint4 ones does not load in it. The model is changed and returned."""
    quantizers = [n for n in model.graph if is_q(n) and constant_array(n.inputs[0]) is None]
    names = [n.inputs[0].name or "" for n in quantizers if n.inputs[0] is not None]
    session = Session(model, taps=names, threads=1)
    seen = [session.run(feed, names) for feed in samples]
    for index, (node, name) in enumerate(zip(quantizers, names, strict=True)):
        form = parameters(node)
        assert form is not None
        assert node.inputs[0] is not None
        values = np.concatenate([run[name].reshape(-1) for run in seen])
        scale, zero = _least_error_range(values, form.scale.item(), form.zero.item())

        def put(what: str, array: Any, number: int = index) -> ir.Value:
            value = ir.Value(name=f"narrow_{number}_{what}", const_value=ir.tensor(array))
            model.graph.register_initializer(value)
            return value

        for pair in (node, *(use.node for use in node.outputs[0].uses())):
            pair.replace_input_with(1, put(f"scale_{pair.op_type}", np.float32(scale)))
            pair.replace_input_with(2, put(f"zero_{pair.op_type}", np.uint8(zero)))
        bounds = [put("low", np.float32(-zero * scale)), put("high", np.float32((15 - zero) * scale))]
        clip = ir.node("Clip", [node.inputs[0], *bounds], name=f"narrow_{index}")
        clip.outputs[0].name = f"narrow_{index}_clipped"
        model.graph.insert_before(node, [clip])
        node.replace_input_with(0, clip.outputs[0])
    return model


def _least_error_range(values: Any, scale: float, zero: int) -> tuple[float, int]:
    """Scale and zero point of 16 levels within the range of the 256 given."""
    low, high = -zero * scale, (255 - zero) * scale
    best, lowest = (1.0, 0), np.inf
    for clip in np.linspace(1.0, 0.2, 33):
        step = (high - low) * clip / 15
        place = int(np.clip(np.rint(-low * clip / step), 0, 15))
        rounded = (np.clip(np.rint(values / step) + place, 0, 15) - place) * step
        error = float(np.square(rounded - values).mean())
        if error < lowest:
            best, lowest = (step, place), error
    return best


def _stored(node: ir.Node) -> Any:
    return constant_array(node.inputs[0])


def _least_error(rows: Any, largest: int) -> Any:
    full = np.abs(rows).max(axis=1) / largest
    full = np.where(full > 0, full, 1.0)
    best, lowest = full, np.full(full.shape, np.inf)
    for clip in np.linspace(1.0, 0.2, 33):
        scale = full * clip
        rounded = np.clip(np.rint(rows / scale[:, None]), -largest, largest) * scale[:, None]
        error = np.square(rounded - rows).sum(axis=1)
        best, lowest = np.where(error < lowest, scale, best), np.minimum(error, lowest)
    return best


def subject(name: str) -> dict[str, Any]:
    """Model, data and metric."""
    folder = ROOT / "graphopt" / "demo" if name == "digits" else ROOT / ".cache" / "models" / name
    metrics = {m.name: f"{ROOT / 'tools/realdata/metrics.py'}:{m.metric}" for m in MODELS}
    return {
        "model": folder / ("digits.onnx" if name == "digits" else "model.onnx"),
        "data": folder / "calibration.npz",
        "eval_data": folder / "evaluation.npz",
        "metric": "accuracy" if name == "digits" else metrics[name],
    }


def fewer_layers(keep: list[int]) -> ir.Model:
    """MiniLM without the layers that are not kept: what read one reads what came before it."""
    model = load(subject("minilm")["model"])
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    before = by_name["/encoder/embeddings/LayerNorm/LayerNormalization_output_0"]
    for index in range(_LAYERS):
        made = by_name[_LAYER.format(index)]
        if index in keep:
            before = made
            continue
        for use in list(made.uses()):
            use.node.replace_input_with(use.idx, before)
    return model


def matched(keep: list[int]) -> list[str]:
    """``--match`` of finetune: each kept layer ends where, in the teacher, those left out behind it end."""
    ends = [index - 1 for index in keep[1:]]
    return [f"{_LAYER.format(a)}={_LAYER.format(b)}" for a, b in zip(keep, ends, strict=False)]


def recovered(name: str, student: ir.Model, seed: int, training: dict[str, Any]) -> dict[str, Any]:
    """One training: metric before and after, and seconds."""
    about = {**subject(name), **training}
    teacher = about.pop("model")
    started = time.perf_counter()
    try:
        report = graphopt.finetune(student, teacher=teacher, seed=seed, time=0, threads=1, **about).report
    except NothingDone as error:
        report = error.report or {}
    metric, entry = report.get("metric"), report["ledger"][-1]["metrics"]
    return {
        "seed": seed,
        "before": metric["original"] if metric else None,
        "after": metric["candidate"] if metric and report["error"] is None else None,
        "low": metric["low"] if metric else None,
        "high": metric["high"] if metric else None,
        "error": report["error"],
        "seconds": time.perf_counter() - started,
        "step_ms": 1e3 * entry.get("seconds_per_step", 0.0),
        "steps": entry.get("steps"),
    }


def student_of(name: str, bits: int, options: argparse.Namespace) -> Any:
    """What is trained: a float model pruned or with fewer layers, or an int8 one with fewer bits."""
    about = subject(name)
    if options.macs:
        return graphopt.prune(
            about["model"], data=about["data"], macs=options.macs, time=0, threads=1, allow_slower=True
        )
    if options.layers:
        keep = [int(layer) for layer in options.layers.split(",")]
        return graphopt.optimize(fewer_layers(keep), passes=["remove-unused"], time=0, verify="off")
    int8 = graphopt.quantize(about["model"], data=about["data"], time=0, threads=1)
    result = graphopt.optimize(int8.model, passes=["remove-unused"], time=0, verify="off")
    if bits < 8:
        narrow(result.ir_model, bits, per_tensor=options.per_tensor)
    if options.activations < 8:
        inputs = interface(result.ir_model)[0]
        samples = [feeds(sample, inputs) for sample in load_data(about["data"], inputs)]
        narrow_activations(result.ir_model, samples[:64])
    return result


def table_row(name: str, what: str, rows: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    done = [row for row in rows if row["after"] is not None]
    if not done:
        return f"| {name} | {what} | kept as it was: {rows[0]['error']} | | | |"
    mean = {key: float(np.mean([row[key] for row in done])) for key in ("before", "after", "seconds", "step_ms")}
    interval = f", 95 %: {done[0]['low']:+.3f} to {done[0]['high']:+.3f}" if len(done) == 1 else ""
    several = f" ({min(r['after'] for r in done):.4f} to {max(r['after'] for r in done):.4f})" if len(done) > 1 else ""
    return (
        f"| {name} | {what} | {mean['before']:.4f} | {mean['after']:.4f}{several}{interval} | "
        f"{mean['step_ms']:.0f} ms | {mean['seconds']:.0f} |"
    )


def main() -> int:
    """Print the table (Markdown) or, with ``--json``, the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="digits")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--activations", type=int, default=8, choices=(4, 8))
    parser.add_argument("--macs", type=float)
    parser.add_argument("--layers", help="of minilm: those that the student has, like 0,2,4")
    parser.add_argument("--match", action="store_true", help="of --layers: inner layers learn from the teacher's")
    parser.add_argument("--train-scales", choices=("none", "weights", "all"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument(
        "--train", type=int, metavar="SAMPLES", help="new ones to train on (rec, efficientnet-lite0, minilm)"
    )
    parser.add_argument("--write", help="write the (last) student here and train nothing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    training: dict[str, Any] = {"steps": options.steps, "batch": options.batch}
    training |= {"lr": options.lr} if options.lr else {}
    training |= {"scales": options.train_scales} if options.train_scales else {}
    training |= {"match": matched([int(n) for n in options.layers.split(",")])} if options.match else {}
    found = []
    if not options.json and not options.write:
        print("| model | student | before | after | step | seconds |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for name in options.models.split(","):
        for bits in (int(b) for b in options.bits.split(",")):
            what = f"{options.macs} of the MACs" if options.macs else f"W{bits}A{options.activations}"
            what = f"layers {options.layers}" if options.layers else what
            try:
                result = student_of(name, bits, options)
            except GraphoptError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            if options.write:
                result.save(options.write)
                continue
            if options.train:
                from training_samples import samples  # needs what makes the data of real models

                training["data"] = samples(name, options.train)
            rows = [recovered(name, result.ir_model, seed, training) for seed in range(options.seeds)]
            found += [{"model": name, "student": what, **row} for row in rows]
            if not options.json:
                print(table_row(name, what, rows), flush=True)
            if options.macs or options.layers:
                break
    if options.json:
        print(json.dumps({"schema_version": 1, "rows": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
