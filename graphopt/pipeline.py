"""The one road every model takes: load, data, passes, judging, gates, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import data as data_module
from graphopt.base import Context, Gates, Pipeline, Progress
from graphopt.errors import GateFailed, InputError, NothingDone
from graphopt.gates import Metric, load_metric
from graphopt.judge import Verdict, judge
from graphopt.manager import PassManager, RunResult
from graphopt.model import ModelLike, interface, load, to_proto
from graphopt.recipe import Recipe
from graphopt.report.document import about, versions
from graphopt.statistics import Statistics, collect
from graphopt.storage import save
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.data import Dataset
    from graphopt.model import ValueSpec


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


def merge_options(given: dict[str, Any], recipe: Recipe | None) -> Options:
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


def as_metric(given: Any) -> Metric | None:
    if given is None or isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return load_metric(given)
    return Metric(getattr(given, "__name__", "metric"), given)


def load_samples(spec: Any, model: ir.Model, options: Options) -> tuple[Dataset, dict[str, Any]]:
    """The usable samples, after a dry run over all of them, and what to report of them."""
    inputs, _ = interface(model)
    dataset = data_module.load_data(spec, inputs, limit=options.samples, seed=options.seed, image=options.image)
    summary = data_module.summarize(dataset, inputs)
    described = {
        "source": dataset.source,
        "samples": len(summary.kept),
        "synthetic": dataset.synthetic,
        "sha256": dataset.digest,
        "skipped": [str(s) for s in summary.skipped],
        "notes": list(summary.notes),
    }
    usable = dataset if len(summary.kept) == len(dataset) else dataset.subset(summary.kept)
    return usable, described


def make(
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
    metric = as_metric(options.metric)
    if options.gates.max_drop is not None and metric is None:
        raise InputError(
            "--max-drop needs a metric to measure the drop of; give --metric accuracy or --metric file.py:function"
        )
    get_target(options.target)
    report: dict[str, Any] = {
        **versions(verb, vars(options)),
        "input": about(model, source if named is None else named),
        "notes": [],
    }
    context = _context(model, options, report)
    result = PassManager(pipeline, verify=options.verify, raise_preconditions=must is not None).run(model, context)
    report["ledger"] = [entry.as_dict() for entry in result.ledger]
    report["notes"] += result.notes
    _nothing_done(result, must, report)
    report["output"] = about(result.model, None)
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
        context.data, report["data"] = load_samples(options.data, model, options)
        if options.eval_data is None:
            context.data, context.eval_data, note = data_module.split(context.data, seed=options.seed)
            report["notes"].append(note)
    if options.eval_data is not None:
        context.eval_data, report["eval_data"] = load_samples(options.eval_data, model, options)
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
    inputs: Sequence[ValueSpec]

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
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
