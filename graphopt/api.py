"""What the command line does, as functions: ``optimize``, ``quantize``, ``compare``, ``run``, ``inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphopt.surgery  # noqa: F401  # registers the gs.Graph loader
from graphopt import data as data_module
from graphopt.base import Pass, Pipeline, flatten
from graphopt.errors import InputError
from graphopt.foreign import foreign
from graphopt.gates import GateResult, MetricResult, drop_gate, measure
from graphopt.graph import label, opset
from graphopt.inspection import inspect_model
from graphopt.manager import PassManager
from graphopt.model import ModelLike, interface, load
from graphopt.pipeline import Options, Result, as_metric, load_samples, make, merge_options
from graphopt.recipe import Recipe, read
from graphopt.registry import create
from graphopt.report.document import about, versions
from graphopt.session import Session
from graphopt.target import get_target
from graphopt.validation import Comparison, compare_sessions, random_feeds

DEFAULT_PASSES = ("fold-constants", "fuse-batchnorm", "remove-unused", "simplify", "remove-unused")
"""What ``optimize`` runs without a recipe: exact passes only."""


@dataclass
class CompareResult:
    """B against A."""

    comparison: Comparison
    metric: MetricResult | None
    report: dict[str, Any]


def optimize(
    model: ModelLike, *, recipe: str | Path | Recipe | None = None, passes: Sequence[Any] | None = None, **options: Any
) -> Result:
    """Run exact passes (or a recipe's) and compare with the original.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        recipe: a TOML file or :class:`~graphopt.recipe.Recipe`; its settings give way to ``options``.
        passes: pass names, :class:`~graphopt.base.Pass` objects or foreign callables, instead of a recipe.
        options: fields of :class:`Options`, and gates (``max_drop``, ``min_sqnr``, ``min_speedup``, ``max_size``).

    Raises:
        InputError: bad model, data, recipe or option.
        GateFailed: a gate was not met; ``error.report`` has everything measured.
    """
    given = read(recipe) if isinstance(recipe, (str, Path)) else recipe
    merged = merge_options(options, given)
    if passes is not None:
        pipeline: Pipeline = [_as_pass(p) for p in passes]
    elif given is not None:
        pipeline = given.passes
    else:
        pipeline = [create(name, {}) for name in DEFAULT_PASSES]
    return make(model, pipeline, merged, verb="optimize")


def quantize(
    model: ModelLike,
    *,
    data: Any = None,
    mode: str = "static",
    observer: str = "mse",
    weights: str = "auto",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    **options: Any,
) -> Result:
    """Simplify, then quantize: ``static`` (QDQ from calibration ``data``) or ``dynamic`` (no data).

    Raises:
        InputError: bad model, data or option; static without data.
        NothingDone: no layer could be quantized; the message says why.
        GateFailed: a gate was not met.
    """
    merged = merge_options({**options, "data": data}, None)
    if mode not in ("static", "dynamic"):
        raise InputError(f"unknown mode '{mode}'; use static or dynamic")
    if mode == "static" and data is None:
        raise InputError(
            "static quantization needs calibration data; give --data calibration.npz (keys = input names), "
            "--data folder/, or --data loader.py:function; or spell out --data random; or use --mode dynamic"
        )
    loaded = load(model, external_roots=merged.external_roots)
    settings: dict[str, Any] = {"exclude": tuple(exclude), "include": tuple(include), "weights": weights}
    if mode == "static":
        settings["observer"] = observer
    pipeline: list[Pass] = []
    wanted = get_target(merged.target).opset
    if 0 < opset(loaded) < wanted:
        pipeline.append(create("upgrade-opset", {"to": wanted}))
    pipeline += [create(name, {}) for name in DEFAULT_PASSES]
    pipeline.append(create(f"quantize-{mode}", settings))
    return make(loaded, pipeline, merged, verb="quantize", named=model, must=f"quantize-{mode}")


def run(recipe: str | Path | Recipe, **options: Any) -> Result:
    """Do what a recipe says, its model and output included (written unless ``output`` is missing).

    Raises:
        InputError, NothingDone, GateFailed: as :func:`optimize` and :func:`quantize`.
    """
    given = read(recipe) if isinstance(recipe, (str, Path)) else recipe
    if given.model is None:
        raise InputError('the recipe names no model; add model = "path.onnx", or use graphopt optimize IN --recipe R')
    merged = merge_options(options, given)
    working = [p.name for p in flatten(given.passes) if p.name.startswith("quantize-")]
    result = make(given.model, given.passes, merged, verb="run", must=working[0] if working else None)
    if given.output is not None:
        result.save(given.output)
        result.report["output"]["path"] = given.output
    return result


def compare(a: ModelLike, b: ModelLike, *, data: Any = None, metric: Any = None, **options: Any) -> CompareResult:
    """Per output: max abs and relative difference, SQNR, cosine, top-1 agreement; and a metric where one is given.

    Raises:
        InputError: a model or the data cannot be used.
        RuntimeFailure: a model does not run.
    """
    merged = merge_options({**options, "data": data, "metric": metric}, None)
    first = load(a, external_roots=merged.external_roots)
    second = load(b, external_roots=merged.external_roots)
    inputs, _ = interface(first)
    mine, theirs = [i.name for i in inputs], [i.name for i in interface(second)[0]]
    if sorted(mine) != sorted(theirs):
        raise InputError(f"the models have other inputs: {', '.join(mine)} and {', '.join(theirs)}; nothing to compare")
    before, after = Session(first, threads=merged.threads), Session(second, threads=merged.threads)
    report: dict[str, Any] = {**versions("compare", vars(merged)), "notes": []}
    result: MetricResult | None = None
    if data is None:
        feeds = random_feeds(first, merged.samples or 4, seed=merged.seed)
        comparison = compare_sessions(before, after, feeds)
        report["data"] = {"source": "random", "samples": len(feeds), "synthetic": True}
    else:
        dataset, report["data"] = load_samples(data, first, merged)
        comparison = compare_sessions(before, after, (data_module.feeds(s, inputs) for s in dataset))
        chosen = as_metric(merged.metric)
        if chosen is not None:
            samples = [data_module.feeds(s, inputs) for s in dataset]
            with_labels = [{**f, **data_module.labels(s, inputs)} for f, s in zip(samples, dataset, strict=True)]
            result = measure(
                chosen, [before.run(f) for f in samples], [after.run(f) for f in samples], with_labels, seed=merged.seed
            )
    report["comparison"] = comparison.as_dict()
    report["metric"] = {**vars(result), "difference": result.difference} if result else None
    report["models"] = [about(first, a), about(second, b)]
    return CompareResult(comparison, result, report)


def comparison_gates(
    result: CompareResult, *, max_drop: str | None = None, min_sqnr: float | None = None, max_abs: float | None = None
) -> list[GateResult]:
    """Hold a comparison to tolerances; outputs of another type or shape fail every one of them."""
    found: list[GateResult] = []
    worst = result.comparison.worst
    if max_drop is not None:
        if result.metric is None:
            raise InputError("--max-drop needs a metric; give --data with labels and --metric accuracy")
        found.append(drop_gate(max_drop, result.metric))
    if min_sqnr is not None:
        value = result.comparison.sqnr
        found.append(GateResult("min-sqnr", f"{min_sqnr:g} dB", f"{value:.2f} dB", value >= min_sqnr))
    if max_abs is not None:
        judged = [o for o in result.comparison.outputs if not o.nondeterministic]
        largest = max((o.max_abs for o in judged), default=0.0)
        passed = largest <= max_abs and not (worst is not None and worst.mismatch)
        text = f"{largest:.3g}" if worst is None or not worst.mismatch else f"output '{worst.name}': {worst.mismatch}"
        found.append(GateResult("max-abs", f"{max_abs:g}", text, passed))
    return found


def plan_quantization(
    model: ModelLike, *, target: str = "ort-cpu", exclude: Sequence[str] = (), include: Sequence[str] = ()
) -> dict[str, Any]:
    """What static quantization would do to ``model``, without data: layers, light operators, and why the rest stays.

    The exact passes run first, as they would.
    """
    from graphopt.passes._placement import place

    loaded = load(model)
    result = PassManager([create(name, {}) for name in DEFAULT_PASSES], verify="off").run(loaded)
    placement = place(result.model, get_target(target), exclude=exclude, include=include)
    return {
        "schema_version": 1,
        "layers": [f"{layer.node.op_type} {label(layer.node)}" for layer in placement.layers],
        "light": [f"{node.op_type} {label(node)}" for node in placement.light],
        "skipped": [vars(skip) for skip in placement.skipped],
    }


def inspect(model: ModelLike, **options: Any) -> dict[str, Any]:
    """What is in a model, as the object ``graphopt inspect --json`` prints."""
    return inspect_model(model, **options)


def _as_pass(item: Any) -> Pass:
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return create(item, {})
    if callable(item):
        return foreign(item)
    raise InputError(f"{item!r} is no pass; give a name, a Pass or a callable")


__all__ = ["CompareResult", "Options", "Result", "compare", "inspect", "optimize", "quantize", "run"]
