"""What the command line does, as functions: ``optimize``, ``quantize``, ``compare``, ``run``, ``inspect``."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import graphopt.surgery  # noqa: F401  # registers the gs.Graph loader
from graphopt import data as data_module
from graphopt.base import Context, Gates, Pass, Pipeline, Progress, flatten
from graphopt.errors import DataError, GateFailed, InputError, NothingDone, RuntimeFailure
from graphopt.foreign import foreign
from graphopt.gates import Metric, MetricResult, load_metric, measure
from graphopt.graph import nodes, opset
from graphopt.inspection import inspect_model
from graphopt.judge import Verdict, judge
from graphopt.manager import PassManager, RunResult
from graphopt.model import ModelLike, interface, load, to_proto, weight_bytes
from graphopt.recipe import Recipe, read
from graphopt.registry import create
from graphopt.session import Session, runtime_version
from graphopt.statistics import Statistics, collect
from graphopt.storage import save
from graphopt.target import get_target, this_cpu
from graphopt.validation import Comparison, compare_sessions, random_feeds

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from graphopt.data import Dataset

SCHEMA_VERSION = 1

DEFAULT_PASSES = ("fold-constants", "fuse-batchnorm", "remove-unused", "simplify", "remove-unused")
"""What ``optimize`` runs without a recipe: exact passes only."""


@dataclass
class Result:
    """What a run ended with. ``report`` is the object that ``--json`` prints."""

    ir_model: ir.Model
    report: dict[str, Any]

    @property
    def model(self) -> onnx.ModelProto:
        """The result as a ``ModelProto``."""
        return to_proto(self.ir_model)

    def save(self, path: str | Path, *, external: bool | None = None) -> list[Path]:
        """Write it atomically; see :func:`graphopt.storage.save`."""
        return save(self.ir_model, path, external=external)


@dataclass
class CompareResult:
    """B against A."""

    comparison: Comparison
    metric: MetricResult | None
    report: dict[str, Any]


@dataclass
class Options:
    """Everything that is common to the verbs that make a model."""

    data: Any = None
    eval_data: Any = None
    metric: str | Callable[..., float] | None = None
    gates: Gates = field(default_factory=Gates)
    target: str = "ort-cpu"
    this_cpu: bool = False
    verify: str = "end"
    seed: int = 0
    threads: int | None = None
    samples: int | None = None
    image: Any = None
    external_roots: Sequence[str | Path] = ()
    time: float = 2.0
    strict: bool = False
    progress: Progress | None = None


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
    merged = _options(options, given)
    if passes is not None:
        pipeline: Pipeline = [_as_pass(p) for p in passes]
    elif given is not None:
        pipeline = given.passes
    else:
        pipeline = [create(name, {}) for name in DEFAULT_PASSES]
    return _make(model, pipeline, merged, verb="optimize")


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
    merged = _options({**options, "data": data}, None)
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
    return _make(loaded, pipeline, merged, verb="quantize", named=model, must=f"quantize-{mode}")


def run(recipe: str | Path | Recipe, **options: Any) -> Result:
    """Do what a recipe says, its model and output included (written unless ``output`` is missing).

    Raises:
        InputError, NothingDone, GateFailed: as :func:`optimize` and :func:`quantize`.
    """
    given = read(recipe) if isinstance(recipe, (str, Path)) else recipe
    if given.model is None:
        raise InputError('the recipe names no model; add model = "path.onnx", or use graphopt optimize IN --recipe R')
    merged = _options(options, given)
    working = [p.name for p in flatten(given.passes) if p.name.startswith("quantize-")]
    result = _make(given.model, given.passes, merged, verb="run", must=working[0] if working else None)
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
    merged = _options({**options, "data": data, "metric": metric}, None)
    first = load(a, external_roots=merged.external_roots)
    second = load(b, external_roots=merged.external_roots)
    inputs, _ = interface(first)
    mine, theirs = [i.name for i in inputs], [i.name for i in interface(second)[0]]
    if sorted(mine) != sorted(theirs):
        raise InputError(f"the models have other inputs: {', '.join(mine)} and {', '.join(theirs)}; nothing to compare")
    before, after = Session(first, threads=merged.threads), Session(second, threads=merged.threads)
    report: dict[str, Any] = {**_versions("compare", merged), "notes": []}
    result: MetricResult | None = None
    if data is None:
        feeds = random_feeds(first, merged.samples or 4, seed=merged.seed)
        comparison = compare_sessions(before, after, feeds)
        report["data"] = {"source": "random", "samples": len(feeds), "synthetic": True}
    else:
        dataset, about = _load_data(data, first, merged)
        report["data"] = about
        comparison = compare_sessions(before, after, (data_module.feeds(s, inputs) for s in dataset))
        chosen = _metric(merged.metric)
        if chosen is not None:
            samples = [data_module.feeds(s, inputs) for s in dataset]
            with_labels = [{**f, **data_module.labels(s, inputs)} for f, s in zip(samples, dataset, strict=True)]
            result = measure(
                chosen, [before.run(f) for f in samples], [after.run(f) for f in samples], with_labels, seed=merged.seed
            )
    report["comparison"] = comparison.as_dict()
    report["metric"] = {**vars(result), "difference": result.difference} if result else None
    report["models"] = [_about(first, a), _about(second, b)]
    return CompareResult(comparison, result, report)


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


def _options(given: dict[str, Any], recipe: Recipe | None) -> Options:
    """Options from keyword arguments over a recipe's settings over the defaults."""
    values: dict[str, Any] = {}
    gates: dict[str, Any] = dict(recipe.gates.asked()) if recipe is not None else {}
    if recipe is not None:
        for name in ("data", "eval_data", "metric", "target", "verify", "seed", "this_cpu"):
            values[name] = getattr(recipe, name)
    for name, value in given.items():
        if name in Gates.__dataclass_fields__:
            if value not in (None, False):
                gates[name] = value
        elif name in Options.__dataclass_fields__:
            if value is not None or name not in values:
                values[name] = value
        else:
            raise TypeError(f"unknown option '{name}'")
    return Options(**{**values, "gates": Gates(**gates)})


def _metric(given: Any) -> Metric | None:
    if given is None or isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return load_metric(given)
    return Metric(getattr(given, "__name__", "metric"), given)


def _load_data(spec: Any, model: ir.Model, options: Options) -> tuple[Dataset, dict[str, Any]]:
    """The usable samples, after a dry run over all of them, and what to report of them."""
    inputs, _ = interface(model)
    dataset = data_module.load_data(spec, inputs, limit=options.samples, seed=options.seed, image=options.image)
    summary = data_module.summarize(dataset, inputs)
    about = {
        "source": dataset.source,
        "samples": len(summary.kept),
        "synthetic": dataset.synthetic,
        "sha256": dataset.digest,
        "skipped": [str(s) for s in summary.skipped],
        "notes": list(summary.notes),
    }
    usable = dataset if len(summary.kept) == len(dataset) else dataset.subset(summary.kept)
    return usable, about


def _make(
    source: ModelLike,
    pipeline: Pipeline,
    options: Options,
    *,
    verb: str,
    must: str | None = None,
    named: ModelLike | None = None,
) -> Result:
    """The one road every model takes: load, data, passes, judging, gates, report.

    ``must`` names the pass that has to change something. ``named``: what to call the source where it is loaded already.
    """
    model = load(source, external_roots=options.external_roots)
    metric = _metric(options.metric)
    if options.gates.max_drop is not None and metric is None:
        raise InputError(
            "--max-drop needs a metric to measure the drop of; give --metric accuracy or --metric file.py:function"
        )
    get_target(options.target)
    report: dict[str, Any] = {
        **_versions(verb, options),
        "input": _about(model, source if named is None else named),
        "notes": [],
    }
    context = _context(model, options, report)
    result = PassManager(pipeline, verify=options.verify, raise_preconditions=must is not None).run(model, context)
    report["ledger"] = [entry.as_dict() for entry in result.ledger]
    report["notes"] += result.notes
    _nothing_done(result, must, report)
    report["output"] = _about(result.model, None)
    approximate = any(e.contract == "approximate" and e.changes for e in result.ledger)
    verdict = judge(
        model,
        result.model,
        context,
        options.gates,
        metric=metric,
        sizes=(report["input"]["bytes"], report["output"]["bytes"]),
        seconds=options.time,
        approximate=approximate,
    )
    report.update(verdict.as_dict())
    report["notes"] += verdict.notes
    report["reproducer"] = str(result.reproducer) if result.reproducer else None
    _hold(verdict, result, options, report)
    return Result(result.model, report)


def _context(model: ir.Model, options: Options, report: dict[str, Any]) -> Context:
    context = Context(
        original=model,
        target=options.target,
        this_cpu=options.this_cpu,
        seed=options.seed,
        threads=options.threads,
        external_roots=tuple(Path(r) for r in options.external_roots),
    )
    if options.progress is not None:
        context.progress = options.progress
    if options.data is not None:
        context.data, report["data"] = _load_data(options.data, model, options)
        if options.eval_data is None:
            context.data, context.eval_data, note = data_module.split(context.data, seed=options.seed)
            report["notes"].append(note)
    if options.eval_data is not None:
        context.eval_data, report["eval_data"] = _load_data(options.eval_data, model, options)
    if context.data is not None and context.data.synthetic:
        report["notes"].append("WARNING: calibrated on random data, as asked; ranges of real inputs will differ")

    def sweep(changed: ir.Model, names: Sequence[str], histograms: bool) -> Statistics:
        assert context.data is not None
        inputs, _ = interface(changed)
        total = len(context.data)
        dataset = context.data
        return collect(
            changed,
            names,
            _Feeds(dataset, inputs),
            histograms=histograms,
            threads=options.threads,
            progress=lambda done: context.progress(done, total, "calibrating"),
        )

    context.collect = sweep
    return context


@dataclass
class _Feeds:
    """A data set as re-iterable feeds."""

    dataset: Dataset
    inputs: Any

    def __iter__(self) -> Any:
        for index, sample in enumerate(self.dataset):
            yield data_module.feeds(sample, self.inputs, name=self.dataset.sample_name(index))


def _nothing_done(result: RunResult, must: str | None, report: dict[str, Any]) -> None:
    if must is None:
        return
    entry = next(e for e in result.ledger if e.name == must)
    if entry.changes:
        return
    reasons = list(dict.fromkeys(s.reason for s in entry.skipped)) or [entry.reason or "no reason was given"]
    shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
    error = NothingDone(f"{must} changed nothing: {shown}; nothing was written")
    error.report = report
    raise error


def _hold(verdict: Verdict, result: RunResult, options: Options, report: dict[str, Any]) -> None:
    """Raise where a gate failed, or a revert matters to the user."""
    problems = [f"gate {g.gate} {g.asked} failed: {g.measured}" for g in verdict.failed]
    if options.strict and result.reverted:
        problems += [f"pass {e.name} was {e.status}: {e.reason}" for e in result.reverted]
    if problems:
        error = GateFailed("; ".join(problems) + "; nothing was written")
        error.report = report
        raise error


def _versions(verb: str, options: Options) -> dict[str, Any]:
    shown = {k: v for k, v in vars(options).items() if k not in ("progress", "gates", "image")}
    plain = {k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v) for k, v in shown.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": verb,
        "options": {**plain, "gates": dict(options.gates.asked())},
        "versions": {
            "graphopt": version("graphopt"),
            "python": platform.python_version(),
            **{name: version(name) for name in ("onnx", "onnx-ir", "onnxsim", "numpy")},
            "onnxruntime": runtime_version(),
        },
        "machine": {"cpu": this_cpu().name, "vnni": this_cpu().vnni, "platform": sys.platform},
    }


def _about(model: ir.Model, source: Any) -> dict[str, Any]:
    data = to_proto(model).SerializeToString(deterministic=True) if weight_bytes(model) < 2**31 - 2**26 else b""
    path = str(source) if isinstance(source, (str, Path)) and str(source) != "-" else None
    size = len(data) or weight_bytes(model)
    if path is not None and Path(path).is_file() and not model.meta.get("graphopt.external"):
        size = Path(path).stat().st_size
    return {
        "path": path,
        "bytes": size,
        "sha256": hashlib.sha256(data).hexdigest() if data else None,
        "weight_bytes": weight_bytes(model),
        "nodes": sum(1 for _ in nodes(model)),
        "opset": opset(model),
        "ir_version": model.ir_version,
        "operators": _histogram(model),
    }


def _histogram(model: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in nodes(model):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


__all__ = [
    "CompareResult",
    "DataError",
    "Options",
    "Result",
    "RuntimeFailure",
    "compare",
    "inspect",
    "optimize",
    "quantize",
    "run",
]
