"""What the command line does, as functions: ``optimize``, ``quantize``, ``compare``, ``run``, ``inspect``, ..."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import graphopt.surgery  # noqa: F401  # registers the gs.Graph loader
from graphopt import data as data_module
from graphopt.base import Context, Skip
from graphopt.benchmark import bench
from graphopt.bisection import Bisection, bisect
from graphopt.common_inputs import check_same_inputs, narrowed, taken_by_b
from graphopt.compression import compress
from graphopt.conversion import convert
from graphopt.divergence import Tolerances, layer_gates, max_abs_gates, tolerances
from graphopt.errors import GateFailed, InputError
from graphopt.extraction import cut_out
from graphopt.finetuning import finetune
from graphopt.gates import GateResult, MetricResult, drop_gate, measure
from graphopt.graph import label
from graphopt.inspection import inspect_model
from graphopt.judge import metric_dict, sqnr_gate
from graphopt.layerwise import layerwise as compare_inner
from graphopt.linting import lint
from graphopt.locking import lock
from graphopt.manager import PassManager
from graphopt.model import ModelLike, interface
from graphopt.model_diff import Diff, diff
from graphopt.outcome import with_report
from graphopt.pipeline import (
    Options,
    Result,
    as_metric,
    check_gates,
    load_samples,
    make,
    merge_options,
    read_source,
    requested,
)
from graphopt.presets import exact_passes, prepare
from graphopt.pruned import prune
from graphopt.ranking import sensitivity
from graphopt.recipe import Recipe, chosen
from graphopt.registry import create
from graphopt.report.document import about, versions
from graphopt.running import expected, run
from graphopt.search.speed import Promise
from graphopt.session import Session
from graphopt.target import get_target
from graphopt.transport import unpack
from graphopt.tuning import tune
from graphopt.validation import Comparison, compare_sessions, random_feeds, runnable

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass
class CompareResult:
    """B against A."""

    comparison: Comparison
    metric: MetricResult | None
    report: dict[str, Any]


def optimize(
    model: ModelLike,
    *,
    recipe: str | Path | Recipe | None = None,
    passes: Sequence[Any] | None = None,
    allow_slower: bool = False,
    **options: Any,
) -> Result:
    """Run exact passes (or a recipe's) and compare with the original.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        recipe: a TOML file or :class:`~graphopt.recipe.Recipe`; its settings give way to ``options``.
        passes: pass names, :class:`~graphopt.base.Pass` objects or foreign callables, instead of a recipe.
        allow_slower: hand over what they quantize even where it is slower than ``model`` on this machine.
        options: fields of :class:`Options`, and gates (``max_drop``, ``min_sqnr``, ``min_speedup``, ``max_size``).

    Raises:
        InputError: bad model, data, recipe or option.
        NothingDone: a pass that quantizes, prunes, compresses or finetunes was asked for and changed nothing, or what
            was quantized is slower than ``model`` here; ``error.report`` has everything measured.
        GateFailed: a gate was not met; likewise.
    """
    given, pipeline = chosen(recipe, passes, exact_passes)
    merged = merge_options(options, given)
    merged.settings = {"recipe": recipe}
    must, promise = expected(pipeline, allow_slower or (given is not None and given.allow_slower))
    return make(model, pipeline, merged, verb="optimize", must=must, promise=promise)


def quantize(
    model: ModelLike,
    *,
    data: Any = None,
    mode: str = "static",
    observer: str | None = None,
    weights: str = "auto",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    allow_slower: bool = False,
    placement: str = "auto",
    cost_table: str | Path | None = None,
    objective: str = "latency",
    **options: Any,
) -> Result:
    """Simplify, then quantize: ``static`` (QDQ from calibration ``data``) or ``dynamic`` (no data needed).

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        data: calibration samples, in any form :func:`graphopt.data.load_data` reads.
        mode: ``static`` or ``dynamic``.
        observer: how ``static`` chooses ranges: ``mse`` (default), ``min-max``, ``percentile``, ``entropy``.
        weights: ``auto``, ``s8``, ``s7`` or ``u8``.
        exclude: names, globs, ``re:`` expressions or operator types that stay in float.
        include: the only ones to quantize, likewise.
        allow_slower: hand the result over even where it is slower than ``model`` on this machine.
        placement: what runs in integers: as the target's ``rules`` say, as ``measured`` here, or ``auto``: measured
            where the target is this machine, ``time`` is not 0 and ``allow_slower`` not given, and no more than looked
            at where the costs of the regions say that nothing is to be gained.
        cost_table: a file for measuring: read where it exists, and then it decides; else written.
        objective: what mixtures of integers and float are chosen for, of those that are not slower than ``model`` (or
            reach ``min_speedup``): ``latency``, ``size``, or ``accuracy``, which measures them in any case.
        options: fields of :class:`Options`, and gates (``max_drop``, ``min_sqnr``, ``min_speedup``, ``max_size``).

    Raises:
        InputError: bad model, data or option; static without data.
        NothingDone: no layer could be quantized, or the result is slower than the original; the message says why.
        GateFailed: a gate was not met.
    """
    merged = merge_options({**options, "data": data}, None)
    settings = _quantization(mode, observer, weights, exclude, include)
    if mode == "static" and data is None:
        raise InputError(
            "static quantization needs calibration data; give --data calibration.npz (keys = input names), "
            "--data folder/, or --data loader.py:function; or spell out --data random; or use --mode dynamic"
        )
    check_gates(merged)
    promise = Promise(allow_slower, placement, cost_table, objective)
    promise.check(mode, merged.target, merged.time)
    merged.settings = {"mode": mode, **settings, **vars(promise)}
    loaded, source = read_source(model, merged)
    why = runnable(loaded) if mode == "static" else None
    if why is not None:
        raise InputError(f"static quantization has to run the model and cannot: {why}; try --mode dynamic, or optimize")
    before = prepare(loaded, merged.target, calibrated=mode == "static", exclude=exclude)
    pipeline = [*before, create(f"quantize-{mode}", settings)]
    must = [f"quantize-{mode}"]
    return make(loaded, pipeline, merged, verb="quantize", named=source, must=must, promise=promise)


def _quantization(
    mode: str, observer: str | None, weights: str, exclude: Sequence[str], include: Sequence[str]
) -> dict[str, Any]:
    """The options of the quantizing pass."""
    if mode not in ("static", "dynamic"):
        raise InputError(f"unknown mode '{mode}'; use static or dynamic")
    if mode == "dynamic" and observer is not None:
        raise InputError("--observer chooses ranges from calibration data and --mode dynamic uses none; leave one out")
    for name, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise InputError(f"{name} is one string; give a list of patterns: [{patterns!r}]")
    chosen: dict[str, Any] = {"weights": weights, "exclude": tuple(exclude), "include": tuple(include)}
    return {"observer": observer or "mse", **chosen} if mode == "static" else chosen


def plan_quantization(
    model: ModelLike,
    *,
    mode: str = "static",
    weights: str = "auto",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    observer: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What :func:`quantize` would do to ``model``, without data: which layers, and why the rest stays in float.

    The exact passes run first, as they would.

    Raises:
        InputError: bad model or option.
    """
    merged = merge_options(options, None)
    settings = _quantization(mode, observer, weights, exclude, include)
    merged.settings = {"mode": mode, **settings}
    loaded, source = read_source(model, merged)
    pipeline = [*requested(loaded, merged), *prepare(loaded, merged.target)]
    prepared = PassManager(pipeline, verify="off").run(loaded).model
    quantizer = create(f"quantize-{mode}", settings)
    quantizer.check(prepared)
    if mode == "static":
        layers, light, skipped = _static_plan(prepared, loaded, merged.target, exclude, include)
    else:  # it needs no data, so it is simply tried on a copy that nobody sees
        context = Context(original=loaded, target=merged.target, this_cpu=merged.this_cpu, seed=merged.seed)
        done = quantizer.run(prepared, context)
        layers, light, skipped = [change.site for change in done.changes], [], done.skipped
    return {
        **versions("quantize", vars(merged)),
        "dry_run": True,
        "input": about(loaded, source),
        "layers": layers,
        "light": light,
        "skipped": [vars(skip) for skip in skipped],
    }


def _static_plan(
    model: ir.Model, original: ir.Model, target: str, exclude: Sequence[str], include: Sequence[str]
) -> tuple[list[str], list[str], list[Skip]]:
    """(layers, light operators between them, what stays in float) of static quantization."""
    from graphopt.passes._patterns import check_patterns
    from graphopt.passes._placement import place

    gone = check_patterns(model, original, exclude, "exclude") + check_patterns(model, original, include, "include")
    placement = place(model, get_target(target), exclude=exclude, include=include)
    return (
        [f"{layer.node.op_type} {label(layer.node)}" for layer in placement.layers],
        [f"{node.op_type} {label(node)}" for node in placement.light],
        gone + placement.skipped,
    )


def compare(
    a: ModelLike,
    b: ModelLike,
    *,
    data: Any = None,
    metric: Any = None,
    max_drop: str | None = None,
    min_sqnr: float | None = None,
    max_abs: Any = None,
    layerwise: bool = False,
    memory: str | int | None = None,
    **options: Any,
) -> CompareResult:
    """Per output: max abs and relative difference, SQNR, cosine, top-1 agreement; and a metric where one is given.

    ``max_abs`` is a number for all outputs, or says one for each (``{"out0": 1e-3}``). ``layerwise`` compares the inner
    values too, and holds them to the same tolerances; ``memory`` (``"512MB"``) caps what is tapped at once.

    Raises:
        InputError: a model or the data cannot be used.
        RuntimeFailure: a model does not run.
        GateFailed: ``max_drop``, ``min_sqnr`` (dB) or ``max_abs`` was given and not met; ``error.report`` has the rest.
    """
    asked = {"max_drop": max_drop, "min_sqnr": min_sqnr}
    merged = merge_options({**options, **asked, "data": data, "metric": metric}, None)
    limits = tolerances(min_sqnr, max_abs)
    if memory is not None and not layerwise:
        raise InputError("--memory caps what --layerwise taps at once; give --layerwise too")
    merged.settings = {"max_abs": max_abs, "layerwise": layerwise, "memory": memory}
    if merged.gates.min_speedup is not None or merged.gates.max_size is not None or merged.gates.certify:
        raise InputError("compare takes --max-drop, --min-sqnr and --max-abs; the other gates are for what is made")
    if data is not None or metric is not None or max_drop is not None:  # --samples alone counts random ones
        check_gates(merged)
    (first, source_a), (second, source_b) = read_source(a, merged), read_source(b, merged)
    check_same_inputs(first, second)
    report: dict[str, Any] = {
        **versions("compare", vars(merged)),
        "models": [about(first, source_a), about(second, source_b)],
        "notes": [],
    }
    if not layerwise:
        limits.check([output.name for output in interface(first)[1]])
    comparison, result, report["data"], feeds = _compare(first, second, merged)
    report["notes"] += comparison.notes
    report["comparison"] = comparison.as_dict()
    report["metric"] = metric_dict(result)
    gates = _tolerances(comparison, result, merged, limits)
    if layerwise:
        report["layers"], layers = compare_inner(
            first, second, feeds, limits, memory=memory, threads=merged.threads, progress=merged.progress
        )
        gates += layer_gates(layers, limits)
    report["gates"] = [gate.as_dict() for gate in gates]
    report["exit_code"], report["error"] = 0, None
    failed = [f"gate {g.gate} {g.asked} failed: {g.measured}" for g in gates if not g.passed]
    if failed:
        raise with_report(GateFailed("; ".join(failed)), report)
    return CompareResult(comparison, result, report)


def _compare(
    first: ir.Model, second: ir.Model, options: Options
) -> tuple[Comparison, MetricResult | None, dict[str, Any], Callable[[], Iterable[Any]]]:
    """The comparison, the metric where one is asked for, what to report of the data, and the data again."""
    inputs, _ = interface(first)
    before, after = Session(first, threads=options.threads), Session(second, threads=options.threads)
    if options.data is None:
        feeds = random_feeds(narrowed(first, second), options.samples or 4, seed=options.seed)
        described = {"source": "random", "samples": len(feeds), "synthetic": True, "sha256": None}
        return compare_sessions(before, after, feeds), None, {**described, "skipped": [], "notes": []}, lambda: feeds
    dataset, described = load_samples(options.data, first, options)

    def again() -> Iterable[Any]:
        return taken_by_b((data_module.feeds(s, inputs) for s in dataset), second)

    comparison = compare_sessions(before, after, again())
    chosen = as_metric(options.metric)
    if chosen is None:
        return comparison, None, described, again
    outputs: tuple[list[Any], list[Any]] = ([], [])
    samples = []
    for sample in dataset:
        feed = data_module.feeds(sample, inputs)
        outputs[0].append(before.run(feed))
        outputs[1].append(after.run(feed))
        samples.append({**feed, **data_module.labels(sample, inputs)})
    return comparison, measure(chosen, *outputs, samples, seed=options.seed), described, again


def _tolerances(
    comparison: Comparison, result: MetricResult | None, options: Options, limits: Tolerances
) -> list[GateResult]:
    """The gates of a comparison; outputs of another type or shape fail ``min-sqnr`` and ``max-abs``."""
    found: list[GateResult] = []
    if options.gates.max_drop is not None and result is not None:
        found.append(drop_gate(options.gates.max_drop, result))
    if options.gates.min_sqnr is not None:
        found.append(sqnr_gate(options.gates.min_sqnr, comparison))
    return found + max_abs_gates(comparison, limits)


def extract(
    model: ModelLike, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None, **options: Any
) -> Result:
    """Cut out what lies between the values ``inputs`` and ``outputs`` (None: the model's own).

    Weights, bodies and functions come along; the piece computes exactly what the model computes there.

    Raises:
        InputError: bad model or option; an unknown value, or inputs that do not cut the outputs off (what is missing
            is named).
    """
    merged = merge_options(options, None)
    merged.settings = {"inputs": inputs, "outputs": outputs}
    loaded, source = read_source(model, merged)
    piece, notes = cut_out(loaded, inputs, outputs)
    sides = zip(("inputs", "outputs"), interface(piece), strict=True)
    report = {
        **versions("extract", vars(merged)),
        "input": about(loaded, source),
        "output": about(piece, None),
        **{side: [{"name": v.name, "type": str(v)} for v in values] for side, values in sides},
        "notes": notes,
        "exit_code": 0,
        "error": None,
    }
    return Result(piece, report)


def inspect(model: ModelLike, **options: Any) -> dict[str, Any]:
    """What is in a model, as the object ``graphopt inspect --json`` prints."""
    return inspect_model(model, **options)


__all__ = [
    "Bisection",
    "CompareResult",
    "Diff",
    "Options",
    "Result",
    "bench",
    "bisect",
    "compare",
    "compress",
    "convert",
    "diff",
    "extract",
    "finetune",
    "inspect",
    "lint",
    "lock",
    "optimize",
    "prune",
    "quantize",
    "run",
    "sensitivity",
    "tune",
    "unpack",
]
