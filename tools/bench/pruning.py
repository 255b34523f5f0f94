"""What ``graphopt prune`` removes, whether it is still right, and how fast it is then; Markdown tables.

    python tools/bench/pruning.py [coverage] [digits] [real] [sparsity] [--models a,b] [--macs 0.7] [--amounts 0.9,0.7]

``coverage``: the structures of tools/architectures.py, beside onnxsim's own pruning where it has one. ``digits``: the
demo's CNN at several amounts, without repair, with the moments of each output restored, and with both least squares.
``real``: the same of models of ``make models`` (their own metric on their own data). Both beside onnxsim's own pruning
and, with ``--torch-python``, Torch-Pruning, at the same share of MACs. ``sparsity``: zeros in weights instead, of real
models.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from architectures import ARCHITECTURES, feeds
from fetch_models import MODELS

import graphopt
from graphopt.base import Context
from graphopt.concrete_shapes import shapes_seen
from graphopt.data import Dataset
from graphopt.data import feeds as to_feeds
from graphopt.data import labels as to_labels
from graphopt.errors import GraphoptError
from graphopt.gates import evaluate, load_metric
from graphopt.model import clone, interface, load, to_proto
from graphopt.passes._refit import plan_layers, refit
from graphopt.passes._shrink import Shrinker
from graphopt.passes._units import choose
from graphopt.passes.prune import Prune, totals
from graphopt.pipeline import Options, load_samples
from graphopt.registry import create
from graphopt.session import Session
from graphopt.sweeps import attach
from graphopt.timing import time_models
from graphopt.validation import OutputDifference

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "models"
DEMO = ROOT / "graphopt" / "demo"
REPAIRS = ("none", "moments", "symmetric", "asymmetric")


def macs(proto: onnx.ModelProto, feed: dict[str, Any]) -> int:
    """MACs on ``feed``, of every node whose shapes are known."""
    from graphopt.cost import node_macs

    known = shapes_seen(load(proto), feed, threads=1)
    return sum(node_macs(node, known) or 0 for node in proto.graph.node)


def rival(proto: onnx.ModelProto, feed: dict[str, Any]) -> str:
    """The share of MACs that onnxsim leaves when it is asked for half of all channels; or what it raised."""
    from onnxsim import apply_structured_pruning

    try:
        return f"{macs(apply_structured_pruning(proto, 0.5), feed) / macs(proto, feed):.2f}"
    except Exception as error:  # whatever it raises is its row
        return type(error).__name__


def coverage(share: float, multiple: int) -> None:
    """One row per structure; onnxsim is asked for half of all channels, and what it leaves of the MACs is shown."""
    print(f"| structure | MACs left at --macs {share:g} | valid at two sizes | latency ratio | onnxsim at half |")
    print("| --- | ---: | --- | ---: | ---: |")
    for name, make in ARCHITECTURES.items():
        proto = make()
        samples = [feeds(proto, 1, 16 if i % 2 else 24) for i in range(8)]
        plain = to_proto(graphopt.optimize(proto, time=0).ir_model)
        try:
            result = graphopt.prune(proto, data=samples, macs=share, multiple=multiple, time=0).model
        except GraphoptError as error:
            print(f"| {name} | {error} | | | {rival(plain, samples[0])} |", flush=True)
            continue
        onnx.checker.check_model(result, full_check=True)
        session, before = Session(result, threads=1), Session(proto, threads=1)
        checks = [feeds(proto, 1), feeds(proto, 3, 20)]
        same = all(
            [a.shape for a in session.run(f).values()] == [a.shape for a in before.run(f).values()] for f in checks
        )
        big = [feeds(proto, 8, 64)]
        timed = {"original": plain, "candidate": result}
        sessions = {key: Session(one, threads=1, timed=True) for key, one in timed.items()}
        _, ratios = time_models(sessions, big, seconds=1)
        left = macs(result, samples[0]) / macs(plain, samples[0])
        print(
            f"| {name} | {left:.2f} | {'yes' if same else 'NO'} | {ratios['candidate'][0]:.2f} | "
            f"{rival(plain, samples[0])} |",
            flush=True,
        )


class Judge:
    """What the model gives on the samples that judge, to hold others against."""

    def __init__(self, plain: ir.Model, samples: Dataset, metric: str) -> None:
        self.plain, self.samples, self.metric = plain, samples, load_metric(metric)
        inputs = interface(plain)[0]
        self.labelled = [{**to_feeds(sample, inputs), **to_labels(sample, inputs)} for sample in samples]
        self.feed: dict[str, Any] = to_feeds(next(iter(samples)), inputs)
        self.before = _outputs(plain, samples)
        self.original = evaluate(self.metric, self.before, self.labelled)

    def cell(self, model: ir.Model, left: float) -> str:
        """The metric, and in brackets the share of MACs left and the dB of the first output."""
        after = _outputs(model, self.samples)
        difference = OutputDifference(next(iter(self.before[0])))
        for a, b in zip(self.before, after, strict=True):
            difference.add(a[difference.name], b[difference.name])
        return f"{evaluate(self.metric, after, self.labelled):.4f} ({left:.2f}, {difference.sqnr:.1f} dB)"


def accuracy(
    name: str,
    source: Path,
    files: tuple[Path, Path],
    metric: str,
    amounts: tuple[str, ...],
    options: argparse.Namespace,
) -> None:
    """One row per repair and rival, a column per amount, with the share of MACs really left and the dB.

    The model is weighed once, and every amount is chosen from the same order.
    """
    plain = graphopt.optimize(source, time=0, verify="off").ir_model
    context, judging = _context(plain, files)
    judge = Judge(plain, judging, metric)
    print(f"| {name} ({judge.original:.4f}) | " + " | ".join(f"{float(a):.0%} of the MACs" for a in amounts) + " |")
    print("| --- |" + " ---: |" * len(amounts))
    if not options.rivals_only:
        own_rows(judge, context, amounts)
    for everywhere in (False, True):
        cells = " | ".join(onnxsim_cells(judge, amounts, everywhere))
        print(f"| onnxsim, {'all layers compete' if everywhere else 'each layer alike'} | {cells} |", flush=True)
    if options.torch_python:
        cells = " | ".join(torch_cells(options.torch_python, name, source, judge, amounts))
        print(f"| Torch-Pruning, magnitude | {cells} |", flush=True)
    print()


def own_rows(judge: Judge, context: Context, amounts: tuple[str, ...]) -> None:
    """By size of the weights without repair, then by loss with each repair."""
    plain = judge.plain
    for importance, repairs in (("l2", ("none",)), ("loss", REPAIRS)):
        step = create("prune", {"importance": importance})
        assert isinstance(step, Prune)
        channels = step.find(plain, context)
        paths = step.paths(plain, channels, context)
        chosen = [choose(channels, paths, "macs", float(amount), 8) for amount in amounts]
        for repair in repairs:
            cells = []
            for keep in chosen:
                model, left = clone(plain), totals(channels, keep)["macs_left"]
                own = step.find(model, context)
                layers = plan_layers(model, own, keep)
                Shrinker(model, own, keep).run()
                if repair != "none":
                    refit(plain, model, layers, context, repair)
                cells.append(judge.cell(model, left))
            print(f"| {importance}, repair {repair} | " + " | ".join(cells) + " |", flush=True)


def onnxsim_cells(judge: Judge, amounts: tuple[str, ...], everywhere: bool) -> Iterator[str]:
    """Of onnxsim's own pruning, at the smallest ratio (in 128ths) that leaves at most each amount of the MACs.

    ``everywhere``: channels of all layers compete, which onnxsim calls global sparsity. It is no default of onnxsim's.
    """
    proto, parts = to_proto(judge.plain), 128
    whole = macs(proto, judge.feed)
    shares = {0: 1.0}

    def pruned(part: int) -> onnx.ModelProto:
        from onnxsim import apply_structured_pruning  # here, so that where it is missing is a cell, too

        result: onnx.ModelProto = apply_structured_pruning(proto, part / parts, global_sparsity=everywhere)
        return result

    def share(part: int) -> float:
        if part not in shares:
            shares[part] = macs(pruned(part), judge.feed) / whole
        return shares[part]

    for amount in amounts:
        try:
            low, high = 0, parts - 1
            if share(high) > float(amount):
                yield f"leaves {share(high):.2f}"
                continue
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if share(middle) <= float(amount) else (middle, high)
            yield judge.cell(load(pruned(high)), share(high))
        except Exception as error:  # whatever it raises is its row
            yield type(error).__name__


def torch_cells(python: str, name: str, source: Path, judge: Judge, amounts: tuple[str, ...]) -> Iterator[str]:
    """Of Torch-Pruning on the network in torch; what it exports is counted and judged as the others are."""
    script = str(Path(__file__).with_name("torch_pruning_rival.py"))
    proto = to_proto(judge.plain)
    whole = macs(proto, judge.feed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        onnx.save(proto, folder / "plain.onnx")
        np.savez(folder / "sample.npz", **judge.feed)
        given = [name, str(folder / "plain.onnx"), str(source), str(folder / "sample.npz"), ",".join(amounts), scratch]
        try:
            done = subprocess.run([python, script, *given], capture_output=True, text=True, check=False)
            told, why = (done.stdout.strip() or f"exit {done.returncode}").splitlines()[-1], done.stderr
        except OSError as error:  # no such interpreter
            told, why = type(error).__name__, str(error)
        for amount in amounts:
            path = folder / f"{amount}.onnx"
            try:
                yield judge.cell(load(path), macs(onnx.load(path), judge.feed) / whole) if path.is_file() else told
            except Exception as error:  # as above
                yield f"cannot run: {type(error).__name__}"
        if not all((folder / f"{amount}.onnx").is_file() for amount in amounts):
            print(why[-1500:], file=sys.stderr)  # why, in full


def sparsity(name: str, source: Path, files: tuple[Path, Path], metric: str) -> None:
    """Rows of ``prune --sparsity``: the metric, dB, bytes as a package and time, both over the original's."""
    for pattern in ("0.5", "2:4"):
        for how, data in (("by size", None), ("on H", files[0])):
            options = {"eval_data": files[1], "metric": metric, "verify": "off", "threads": 1, "time": 1.0}
            report = graphopt.prune(source, sparsity=pattern, data=data, **options).report
            metrics = next(e for e in report["ledger"] if e["pass"] == "sparsify")["metrics"]
            before, after = metrics["packed_bytes"]
            found = f"{report['metric']['original']:.4f} | {report['metric']['candidate']:.4f}"
            db, slow = report["comparison"]["outputs"][0]["sqnr_db"], report["latency_ratio"]["median"]
            print(
                f"| {name} | {pattern} | {how} | {found} | {db:.1f} | {after / before:.2f} | {slow:.2f} |", flush=True
            )


def _context(plain: ir.Model, files: tuple[Path, Path]) -> tuple[Context, Dataset]:
    options = Options(data=files[0], eval_data=files[1])
    context = Context(original=plain, threads=1)
    context.data, _ = load_samples(options.data, plain, options)
    judging, _ = load_samples(options.eval_data, plain, options)
    attach(context)
    return context, judging


def _outputs(model: ir.Model, samples: Dataset) -> list[dict[str, Any]]:
    session = Session(model, threads=1)
    return [session.run(to_feeds(sample, interface(model)[0])) for sample in samples]


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["coverage", "digits"], help="coverage, digits, real, sparsity")
    parser.add_argument("--models", help="comma-separated names of real models (default: all that are fetched)")
    parser.add_argument("--macs", type=float, default=0.7, help="of coverage")
    parser.add_argument("--multiple", type=int, default=8, help="of coverage: what channels are rounded to")
    parser.add_argument("--amounts", default="0.9,0.8,0.7,0.5", help="shares of the MACs of digits and real")
    parser.add_argument("--torch-python", help="an interpreter with torch and torch-pruning: its row is printed, too")
    parser.add_argument("--rivals-only", action="store_true", help="of digits and real, only the rivals' rows")
    options = parser.parse_args()
    amounts = tuple(options.amounts.split(","))
    if "coverage" in options.what:
        coverage(options.macs, options.multiple)
    if "digits" in options.what:
        files = (DEMO / "calibration.npz", DEMO / "evaluation.npz")
        accuracy("digits CNN", DEMO / "digits.onnx", files, "accuracy", amounts, options)
    if {"real", "sparsity"} & set(options.what):
        wanted = options.models.split(",") if options.models else [m.name for m in MODELS]
        for known in (m for m in MODELS if m.name in wanted and (CACHE / m.name / "evaluation.npz").is_file()):
            folder = CACHE / known.name
            files = (folder / "calibration.npz", folder / "evaluation.npz")
            metric = f"{ROOT / 'tools/realdata/metrics.py'}:{known.metric}"
            if "sparsity" in options.what:
                sparsity(known.name, folder / "model.onnx", files, metric)
                continue
            accuracy(known.name, folder / "model.onnx", files, metric, amounts, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
