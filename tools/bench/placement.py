"""Does the cut matter? Placement by minimum cut against all-int8, the operator list and greedy, at the same budget.

    python tools/bench/placement.py [--models a,b] [--max-drop 1%] [--time 4] [--json FILE]

Every placement has the same passes, calibration data and prices; what differs is who decides what stays in float:

* ``all-int8``: nobody, everything that can be quantized is;
* ``operators``: the best operator type to leave in float (those it has, each alone, or none), by predicted time;
* ``greedy alone``: each region goes where it is cheaper by itself, conversions are not looked at;
* ``greedy``: starts from all-int8 and moves the region that gains most, conversions included, until none gains;
* ``cut``: the minimum of all, conversions included (no correction, no flips: the plain algorithm);
* ``graphopt``: what ``quantize --placement measured`` hands over (corrected by wholes, flips).

Where the metric drops by more than ``--max-drop`` for one of the first five, layers go back to float worst first, as
``quantize --max-drop`` does it, from where that placement left off. All run interleaved against the original in one
race, one thread. Needs the models of ``make models``. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fetch_models import MODELS

from graphopt.base import Context, Gates
from graphopt.gates import load_metric
from graphopt.judge import SLOWER, judge, timed_feeds
from graphopt.manager import PassManager
from graphopt.model import clone, load
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.pipeline import Options, make_context
from graphopt.presets import prepare
from graphopt.search.budget import quantize_without, within_budget, without
from graphopt.search.limits import Limit, limit_of
from graphopt.search.measured import Search
from graphopt.search.placement import Prices, Unit, cut, price
from graphopt.search.racing import race
from graphopt.session import Session

if TYPE_CHECKING:
    import onnx_ir as ir

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "models"

Placement = frozenset[str]


def operators(found: list[Unit], prices: Prices) -> Placement:
    """The cheapest of leaving no operator type in float, or one of them."""
    kinds: dict[str, set[str]] = {}
    for unit in found:
        node = unit.nodes[0]
        group = node.attributes.get("group")
        deep = group is not None and group.value > 1
        kinds.setdefault(f"{node.op_type}{' with groups' if deep else ''}", set()).add(unit.name)
    tried = [frozenset[str](), *map(frozenset, kinds.values())]
    return min(tried, key=lambda floats: (price(found, prices, floats), sorted(floats)))


def greedy_alone(found: list[Unit], prices: Prices) -> Placement:
    """Each region for itself."""
    return frozenset(u.name for u in found if prices.in_float[u.name] < prices.in_integers[u.name])


def greedy(found: list[Unit], prices: Prices) -> Placement:
    """The move that gains most, until none does."""
    now: Placement = frozenset()
    while True:
        best = min((now ^ {u.name} for u in found), key=lambda f: (price(found, prices, f), sorted(f)))
        if price(found, prices, best) >= price(found, prices, now):
            return now
        now = best


WAYS: dict[str, Callable[[list[Unit], Prices], Placement]] = {
    "all-int8": lambda found, prices: frozenset(),
    "operators": operators,
    "greedy alone": greedy_alone,
    "greedy": greedy,
    "cut": cut,
}


def built(exact: ir.Model, step: QuantizeStatic, context: Context, floats: Placement, limit: Limit | None) -> Any:
    """(model, layers that went back to float for the budget); (None, 0) where nothing keeps to it."""
    model = clone(exact)
    if not quantize_without(model, step, context, sorted(floats)).changes:
        return exact, 0  # all of it is float: that is a placement too
    if limit is None or limit(model):
        return model, 0
    kept = within_budget(exact, without(step, sorted(floats)), context, limit)
    return (kept.model, len(kept.excluded)) if kept.model is not None else (None, 0)


def prepared(name: str) -> tuple[ir.Model, ir.Model, Context]:
    """(a real model, the same as it is quantized, its data), one thread."""
    folder, options = CACHE / name, Options(threads=1)
    options.data, options.eval_data = str(folder / "calibration.npz"), str(folder / "evaluation.npz")
    original = load(folder / "model.onnx")
    context = make_context(original, options, {"notes": []})
    exact = PassManager(prepare(original, "ort-cpu", calibrated=True), verify="off").run(original, context).model
    return original, exact, context


def measured(name: str, metric: str, max_drop: str, seconds: float) -> dict[str, Any]:
    """Every placement of one model: predicted time, regions in float, metric, measured ratio."""
    original, exact, context = prepared(name)
    gates = Gates(max_drop=max_drop)
    judged_by = load_metric(f"{ROOT / 'tools/realdata/metrics.py'}:{metric}")
    step, feeds = QuantizeStatic(), timed_feeds(original, context)
    limit = limit_of(original, context, gates, judged_by)
    rules = clone(exact)
    step.run(rules, context)
    search = Search(original, exact, rules, step, context, feeds, limit, seconds)
    found = search.run()  # fills the table, as the verb does
    prices = search.pricing(given=False).prices()
    models: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for way, decide in WAYS.items():
        floats = decide(search.units, prices)
        models[way], back = built(exact, step, context, floats, limit)
        rows[way] = {"in_float": len(floats), "predicted_us": price(search.units, prices, floats) / 1e3, "back": back}
    floats = found.chosen.floats
    models["graphopt"] = found.chosen.model
    predicted = price(search.units, prices, floats) / 1e3
    rows["graphopt"] = {"in_float": len(floats), "predicted_us": predicted, "back": 0}
    sessions = {"original": Session(original, threads=1, timed=True)}
    for way, model in models.items():
        if model is not None:
            sessions[way] = Session(model, threads=1, timed=True)
    ratios = race(sessions, feeds, seconds=seconds * len(sessions))
    for way, row in rows.items():
        row["ratio"] = ratios.get(way)
        if models[way] is not None:
            told = judge(
                original, models[way], replace(context), Gates(), metric=judged_by, sizes=(1, 1), seconds=0,
                approximate=False,
            )  # fmt: skip
            assert told.metric is not None
            row["metric"], row["original_metric"] = told.metric.candidate, told.metric.original
    return {"regions": len(search.units), "placements": rows}


def lines(name: str, report: dict[str, Any]) -> Iterable[str]:
    """The rows of a model, Markdown."""
    for way, row in report["placements"].items():
        told = f"{row['in_float']} of {report['regions']}" + (f" + {row['back']} layers" if row["back"] else "")
        if row["ratio"] is None:
            yield f"| {name} | {way} | {told} | {row['predicted_us']:.0f} us | none keeps to the budget | |"
            continue
        median, low, high = row["ratio"]
        change = row["metric"] - row["original_metric"]
        refused = " (exit 3: not written)" if way == "graphopt" and low > SLOWER else ""
        measured_ratio = f"{median:.3f} [{low:.3f}, {high:.3f}]{refused}"
        yield f"| {name} | {way} | {told} | {row['predicted_us']:.0f} us | {measured_ratio} | {change:+.4f} |"


def main() -> int:
    """Print the table, and with ``--json`` write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated names (default: all that are fetched)")
    parser.add_argument("--max-drop", default="1%")
    parser.add_argument("--time", type=float, default=4.0, help="seconds of timing per placement")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    wanted = options.models.split(",") if options.models else [m.name for m in MODELS]
    metrics = {m.name: m.metric for m in MODELS}
    reports: dict[str, Any] = {}
    print("| model | placement | regions in float | predicted | time over float's [90 %] | metric |")
    print("| --- | --- | --- | ---: | --- | ---: |")
    for name in wanted:
        if not (CACHE / name / "evaluation.npz").is_file():
            print(f"{name} is not fetched; run: make models", file=sys.stderr)
            continue
        reports[name] = measured(name, metrics[name], options.max_drop, options.time)
        print("\n".join(lines(name, reports[name])), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
