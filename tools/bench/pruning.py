"""What ``graphopt prune`` removes, whether it is still right, and how fast it is then; Markdown tables.

    python tools/bench/pruning.py [coverage] [digits] [real] [--models a,b] [--macs 0.7]

``coverage``: the structures of tools/architectures.py, beside onnxsim's own pruning where it has one. ``digits``: the
demo's CNN at several amounts, without repair, with the moments of each output restored, and with both least squares.
``real``: models of ``make models`` (their own metric on their own data).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from architectures import ARCHITECTURES, feeds
from fetch_models import MODELS

import graphopt
from graphopt.errors import GraphoptError
from graphopt.model import load, to_proto
from graphopt.registry import create
from graphopt.session import Session
from graphopt.sizes import shapes_seen
from graphopt.timing import time_models

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "models"
DEMO = ROOT / "graphopt" / "demo"
REPAIRS = ("none", "moments", "symmetric", "asymmetric")
AMOUNTS = (0.9, 0.8, 0.7, 0.5)


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


def coverage(share: float) -> None:
    """One row per structure; onnxsim is asked for half of all channels, and what it leaves of the MACs is shown."""
    print(f"| structure | MACs left at --macs {share:g} | valid at two sizes | latency ratio | onnxsim at half |")
    print("| --- | ---: | --- | ---: | ---: |")
    for name, make in ARCHITECTURES.items():
        proto = make()
        samples = [feeds(proto, 1, 16 if i % 2 else 24) for i in range(8)]
        plain = to_proto(graphopt.optimize(proto, time=0).ir_model)
        try:
            result = graphopt.prune(proto, data=samples, macs=share, multiple=4, time=0).model
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


def accuracy(
    name: str, model: Any, options: dict[str, Any], amounts: tuple[float, ...], repairs: tuple[str, ...]
) -> None:
    """One row per repair, one column per amount."""
    plain = graphopt.optimize(model, time=0).ir_model
    print(f"| {name} | " + " | ".join(f"{a:.0%} of the MACs" for a in amounts) + " |")
    print("| --- |" + " ---: |" * len(amounts))
    for importance, repair in [("l2", "none"), *(("loss", r) for r in repairs)]:
        cells = []
        for amount in amounts:
            step = create("prune", {"left": amount, "repair": repair, "importance": importance})
            report = graphopt.optimize(plain, passes=[step], **options).report
            left = report["ledger"][0]["metrics"].get("macs_left")
            cells.append(f"{report['metric']['candidate']:.4f} ({left:.2f})" if left else "nothing")
        original = report["metric"]["original"]
        print(f"| {importance}, repair {repair} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{name}: original {original:.4f}; in brackets the share of MACs really left\n", flush=True)


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["coverage", "digits"], help="coverage, digits, real")
    parser.add_argument("--models", help="comma-separated names of real models (default: all that are fetched)")
    parser.add_argument("--macs", type=float, default=0.7)
    options = parser.parse_args()
    if "coverage" in options.what:
        coverage(options.macs)
    if "digits" in options.what:
        data = {"data": DEMO / "calibration.npz", "eval_data": DEMO / "evaluation.npz", "metric": "accuracy", "time": 0}
        accuracy("digits CNN", DEMO / "digits.onnx", {**data, "threads": 1}, AMOUNTS, REPAIRS)
    if "real" in options.what:
        wanted = options.models.split(",") if options.models else [m.name for m in MODELS]
        for known in (m for m in MODELS if m.name in wanted and (CACHE / m.name / "evaluation.npz").is_file()):
            folder = CACHE / known.name
            data = {"data": folder / "calibration.npz", "eval_data": folder / "evaluation.npz", "time": 0, "threads": 1}
            data["metric"] = f"{ROOT / 'tools/realdata/metrics.py'}:{known.metric}"
            accuracy(known.name, folder / "model.onnx", data, (0.9, options.macs), ("none", "auto"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
