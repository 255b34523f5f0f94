"""Weights in few bits: rounding to nearest beside rounding on the Gram matrix of each layer's input.

    python tools/bench/rounding.py [--models digits,minilm] [--bits 8,7,4,3,2] [--json]

Only weights are rounded, per output channel; activations stay float, so that the difference is the rounding's alone. A
row per model and width: the task metric and the SQNR at the worst output, on evaluation data that no method saw, of
``nearest`` (the scale takes in the largest weight), ``clipped`` (nearest, the scale clipped where that costs least by
the diagonal of H) and ``on H`` (graphopt.passes._rounding, from both scales, each output's better one by the quadratic
on the calibration data; biases take back the mean).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fetch_models import MODELS  # noqa: E402

from graphopt.data import feeds as to_feeds  # noqa: E402
from graphopt.data import labels as to_labels  # noqa: E402
from graphopt.gates import load_metric, measure  # noqa: E402
from graphopt.gram import Seen, squared_error  # noqa: E402
from graphopt.graph import constant_array, value_names  # noqa: E402
from graphopt.linear import Form, form_of, from_matrix, to_matrix  # noqa: E402
from graphopt.manager import PassManager  # noqa: E402
from graphopt.model import clone, interface, load  # noqa: E402
from graphopt.passes._placement import Layer, place  # noqa: E402
from graphopt.passes._rounding import round_on_gram  # noqa: E402
from graphopt.passes._weights import add_constant  # noqa: E402
from graphopt.pipeline import make_context, merge_options  # noqa: E402
from graphopt.presets import prepare  # noqa: E402
from graphopt.session import Session  # noqa: E402
from graphopt.target import get_target  # noqa: E402
from graphopt.validation import OutputDifference  # noqa: E402

METHODS = ("nearest", "clipped", "on H")


class Subject:
    """One model, prepared as ``graphopt quantize`` would, and what its layers read."""

    def __init__(self, name: str) -> None:
        demo = ROOT / "graphopt" / "demo"
        folder = demo if name == "digits" else ROOT / ".cache" / "models" / name
        metrics = {m.name: f"{ROOT / 'tools/realdata/metrics.py'}:{m.metric}" for m in MODELS}
        self.metric = load_metric("accuracy" if name == "digits" else metrics[name])
        given = {"data": str(folder / "calibration.npz"), "eval_data": str(folder / "evaluation.npz"), "threads": 1}
        options = merge_options(given, None)
        source = load(demo / "digits.onnx" if name == "digits" else folder / "model.onnx")
        context = make_context(source, options, {"notes": []})
        self.model = PassManager(prepare(source, options.target), verify="off").run(source, context).model
        inputs, _ = interface(source)
        assert context.eval_data is not None
        assert context.layer_inputs is not None
        self.feeds = [to_feeds(sample, inputs) for sample in context.eval_data]
        labels = [to_labels(sample, inputs) for sample in context.eval_data]
        self.samples = [{**feed, **label} for feed, label in zip(self.feeds, labels, strict=True)]
        before = Session(source, threads=1)
        self.expected = [before.run(feed) for feed in self.feeds]
        self.layers = [layer for layer in place(self.model, get_target("ort-cpu")).layers if form_of(layer.node)]
        forms = [form for layer in self.layers if (form := form_of(layer.node))]
        started = time.process_time()
        self.seen: dict[Form, Seen] = context.layer_inputs(self.model, list(dict.fromkeys(forms)))
        self.sweep_seconds = time.process_time() - started

    def rounded(self, bits: int, method: str) -> dict[str, Any]:
        """Metric, SQNR and seconds of all weights rounded to ``bits`` by ``method``."""
        model, taken = clone(self.model), value_names(self.model)
        layers = {layer.node.outputs[0].name: layer for layer in self.layers}
        here = {v.name: layer for layer in place(model, get_target("ort-cpu")).layers for v in layer.node.outputs}
        started = time.process_time()
        for name, layer in here.items():
            if name in layers:
                self._round(layer, layers[name], bits, method, lambda array, m=model: _constant(m, array, taken))
        seconds = time.process_time() - started
        return {"seconds": seconds, **self.judged(Session(model, threads=1))}

    def _round(self, layer: Layer, original: Layer, bits: int, method: str, constant: Any) -> None:
        stored, form = constant_array(original.weight), form_of(original.node)
        assert stored is not None
        assert form is not None
        moments = self.seen[form].moments
        matrix, mean, gram = to_matrix(layer.node, stored), moments.mean, moments.second_moment
        site = layer.bias_site
        if site is not None:
            gram = gram - mean[:, :, None] * mean[:, None, :]
        error, weight = _rounding(matrix, gram, 2 ** (bits - 1) - 1, method)
        layer.node.replace_input_with(1, constant(from_matrix(layer.node, weight, stored.shape)))
        if site is not None and method == "on H":
            bias = constant_array(site[0].inputs[site[1]])
            assert bias is not None
            shift = np.matmul(error, mean[:, :, None]).reshape(bias.shape)
            site[0].replace_input_with(site[1], constant(bias - shift))

    def judged(self, session: Session) -> dict[str, Any]:
        """The task metric and the SQNR at the worst output."""
        outputs = [session.run(feed) for feed in self.feeds]
        differences = {name: OutputDifference(name) for name in session.output_names}
        for wanted, found in zip(self.expected, outputs, strict=True):
            for name, difference in differences.items():
                difference.add(wanted[name], found[name])
        result = measure(self.metric, self.expected, outputs, self.samples, seed=0)
        sqnr = min(d.sqnr for d in differences.values())
        return {"float": result.original, "metric": result.candidate, "sqnr_db": sqnr}


def _rounding(matrix: Any, gram: Any, largest: int, method: str) -> tuple[Any, Any]:
    """(W~ - W, W~) as matrices."""
    full = np.abs(matrix).max(axis=2) / largest
    full = np.where(full > 0, full, 1.0)
    starts = {"nearest": [full], "clipped": [_clipped(matrix, gram, full, largest)]}
    best, lowest = matrix, np.full(full.shape, np.inf)
    for scale in starts.get(method, [full, *starts["clipped"]]):
        integers, fitted = np.clip(np.rint(matrix / scale[..., None]), -largest, largest), scale
        if method == "on H":
            integers, fitted = round_on_gram(matrix, gram, scale, largest)
        found = integers * fitted[..., None]
        cost = squared_error(found - matrix, gram)
        best = np.where((cost < lowest)[..., None], found, best)
        lowest = np.minimum(cost, lowest)
    return best - matrix, best


def _clipped(matrix: Any, gram: Any, full: Any, largest: int) -> Any:
    diagonal = np.diagonal(gram, axis1=1, axis2=2)[:, None, :]
    best, lowest = full, np.full(full.shape, np.inf)
    for clip in np.linspace(1.0, 0.3, 15):
        scale = full * clip
        rounded = np.clip(np.rint(matrix / scale[..., None]), -largest, largest) * scale[..., None]
        cost = np.sum(np.square(rounded - matrix) * diagonal, axis=2)
        best, lowest = np.where(cost < lowest, scale, best), np.minimum(cost, lowest)
    return best


def _constant(model: Any, array: Any, taken: set[str]) -> Any:
    return add_constant(model, model.graph, "rounded", np.ascontiguousarray(array, np.float32), taken)


def main(arguments: list[str] | None = None) -> int:
    """Print the table (Markdown) or, with ``--json``, the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="digits,minilm")
    parser.add_argument("--bits", default="8,7,4,3,2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    if not options.json:
        print("| model | bits | " + " | ".join(f"{m}: metric (SQNR)" for m in METHODS) + " | seconds on H |")
        print("| --- | ---: |" + " --- |" * len(METHODS) + " ---: |")
    for name in options.models.split(","):
        subject = Subject(name)
        for bits in (int(b) for b in options.bits.split(",")):
            found = {method: subject.rounded(bits, method) for method in METHODS}
            rows.append({"model": name, "bits": bits, "sweep_seconds": subject.sweep_seconds, **found})
            if not options.json:
                cells = [f"{found[m]['metric']:.3f} ({found[m]['sqnr_db']:.1f} dB)" for m in METHODS]
                label = f"{name} (float {found['nearest']['float']:.3f})"
                print(f"| {label} | {bits} | {' | '.join(cells)} | {found['on H']['seconds']:.1f} |", flush=True)
    if options.json:
        print(json.dumps({"schema_version": 1, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
