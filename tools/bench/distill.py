"""MiniLM with three of its six layers, pruned or in integers, taught by the whole one on sentences nobody labelled.

    python tools/bench/distill.py [--student layers|pruned|int8] [--sentences 1500] [--steps 600] [--batch 16] [--lr LR]

The student is the teacher without the other layers than ``--keep 0,2,4`` (or pruned to 0.7 of its MACs, or W8A8); it
learns from sentences in the docstrings of the standard library, as the model's evaluation data are, none of which is
among them. ``--match``: its inner layers learn from the teacher's, too. Prints the metric (how often the nearest
sentence is the teacher's) before and after. Needs ``make models``.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

from realdata.minilm import docstrings, sentences  # noqa: E402

import graphopt  # noqa: E402
from graphopt.errors import NothingDone  # noqa: E402
from graphopt.model import load  # noqa: E402

FOLDER = ROOT / ".cache" / "models" / "minilm"
OUTPUT = "/encoder/encoder/layer.{}/output/LayerNorm/LayerNormalization_output_0"
_LONGEST = 48  # tokens; lengths are padded to eights, since each of them is a gradient graph of its own


def values(model: ir.Model) -> dict[str, ir.Value]:
    """Every computed value by name."""
    return {value.name: value for node in model.graph for value in node.outputs if value.name}


def student(keep: list[int], layers: int = 6) -> ir.Model:
    """The model without the layers that are not kept: what read one reads what came before it."""
    model = load(FOLDER / "model.onnx")
    by_name = values(model)
    before = by_name["/encoder/embeddings/LayerNorm/LayerNormalization_output_0"]
    for index in range(layers):
        made = by_name[OUTPUT.format(index)]
        if index in keep:
            before = made
            continue
        for use in list(made.uses()):
            use.node.replace_input_with(use.idx, before)
    return graphopt.optimize(model, passes=["remove-unused"], time=0, verify="off").ir_model


def made(what: str, keep: list[int]) -> Any:
    """The student."""
    given = {"data": FOLDER / "calibration.npz", "time": 0, "threads": 1}
    if what == "pruned":
        return graphopt.prune(FOLDER / "model.onnx", macs=0.7, **given).ir_model
    if what == "int8":
        return graphopt.quantize(FOLDER / "model.onnx", **given).ir_model
    return student(keep)


def corpus(count: int) -> list[str]:
    """Sentences of the standard library, none of them one that the model is calibrated or judged on."""
    held = set(sentences())
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(path.parts):
            continue
        try:
            found.update(docstrings(path))
        except (SyntaxError, UnicodeDecodeError):
            continue
    fitting = sorted(t for t in found - held if 5 <= len(t.split()) <= 40 and t.isascii())
    order = np.random.default_rng(7).permutation(len(fitting))
    return [fitting[index] for index in order[:count]]


def encoded(texts: list[str]) -> dict[str, Any]:
    """As ``--data`` takes them, padded to a multiple of eight tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding(pad_to_multiple_of=8)
    arrays: dict[str, Any] = {}
    for index, text in enumerate(texts):
        told = tokenizer.encode(text)
        rows = {"input_ids": told.ids, "attention_mask": told.attention_mask, "token_type_ids": told.type_ids}
        arrays |= {f"{name}/{index}": np.array([row], np.int64) for name, row in rows.items()}
    return arrays


def main() -> int:
    """Print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="layers", choices=("layers", "pruned", "int8"))
    parser.add_argument("--keep", default="0,2,4", help="layers that the student has")
    parser.add_argument("--sentences", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--match", action="store_true", help="inner layers learn from the teacher's")
    options = parser.parse_args()
    keep = [int(part) for part in options.keep.split(",")]
    # Each kept layer ends where, in the teacher, those left out behind it end.
    ends = [*(index - 1 for index in keep[1:]), 5]
    match = [f"{OUTPUT.format(a)}={OUTPUT.format(b)}" for a, b in zip(keep[:-1], ends[:-1], strict=True)]
    texts = corpus(options.sentences)
    more: dict[str, Any] = {"lr": options.lr} if options.lr else {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "sentences.npz"
        np.savez(data, **encoded(texts))
        started = time.perf_counter()
        try:
            report = graphopt.finetune(
                made(options.student, keep),
                teacher=FOLDER / "model.onnx",
                data=data,
                eval_data=FOLDER / "evaluation.npz",
                metric=f"{ROOT / 'tools/realdata/metrics.py'}:retrieval_agreement",
                steps=options.steps,
                batch=options.batch,
                match=match if options.match else (),
                time=0,
                threads=1,
                **more,
            ).report
        except NothingDone as error:
            report = error.report or {}
        seconds = time.perf_counter() - started
    metric, entry = report["metric"], report["ledger"][-1]["metrics"]
    what = f"layers {options.keep} of 6" if options.student == "layers" else options.student
    print(f"{what}, {len(texts)} sentences, {options.steps} steps of {options.batch}")
    print(f"retrieval agreement {metric['original']:.4f} -> {metric['candidate']:.4f} ", end="")
    print(f"(95 %: {metric['low']:+.4f} to {metric['high']:+.4f}), {seconds:.0f} s, {report['error'] or 'written'}")
    print({key: entry[key] for key in ("loss", "judged", "steps", "seconds_per_step") if key in entry})
    return 0


if __name__ == "__main__":
    sys.exit(main())
