"""The one road every model takes: load, data, passes, judging, gates, report."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import data as data_module
from graphopt.base import Context, Gates, Pass, Pipeline, Progress
from graphopt.errors import DataError, InputError, ModelError
from graphopt.gates import Metric, load_metric, parse_drop, parse_size
from graphopt.judge import Verdict, judge
from graphopt.ledger import RunResult, told_or_forgotten
from graphopt.manager import VERIFY
from graphopt.model import ModelLike, interface, load, to_proto
from graphopt.opened import read_stdin
from graphopt.outcome import blank, hold, merge_notes, narrowed, something_done
from graphopt.presets import asked, facing
from graphopt.recipe import Recipe
from graphopt.report.document import about, file_sha256, versions
from graphopt.search.budget import Kept, damages
from graphopt.search.speed import Promise, told, untold
from graphopt.stages import Stages
from graphopt.storage import save
from graphopt.sweeps import attach
from graphopt.target import get_target

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from graphopt.data import Dataset


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
    search: bool = True
    strict: bool = False
    opset: int | None = None
    dims: Sequence[str] = ()
    input_shapes: Sequence[str] = ()
    fold_overridable: bool = False
    progress: Progress | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the verb was given; only the report uses it."""


@dataclass
class Result:
    """What a run ended with. ``report`` is the object that ``--json`` prints."""

    ir_model: ir.Model
    report: dict[str, Any]
    original: ir.Model | None = None
    """The model that came in, of verbs that change one."""
    pipeline: Pipeline = ()
    """What makes ``ir_model`` of ``original`` again, without a search; see :mod:`graphopt.locking`."""
    options: Options | None = None

    @property
    def model(self) -> onnx.ModelProto:
        """The result as a ``ModelProto``."""
        return to_proto(self.ir_model)

    def save(self, path: str | Path, *, external: bool | None = None) -> list[Path]:
        """Write it atomically (see :func:`graphopt.storage.save`) and enter the file in the report."""
        written = save(self.ir_model, path, external=external)
        output = self.report["output"]
        output["path"] = str(path)
        # It is written, and to fail now would say that it is not: the report then keeps what was foretold.
        with contextlib.suppress(MemoryError):
            if written:
                output["bytes"] = sum(file.stat().st_size for file in written)
                output["sha256"] = file_sha256(written[0])
        return written


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
            near = difflib.get_close_matches(name, (*Options.__dataclass_fields__, *Gates.__dataclass_fields__), n=1)
            raise TypeError(f"unknown option '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    for name in ("max_drop", "max_size"):  # a recipe may say 0.01 where the command line says "0.01"
        if isinstance(gates.get(name), (int, float)) and not isinstance(gates[name], bool):
            gates[name] = str(gates[name])
    options = Options(**{**values, "gates": Gates(**gates)})
    _check(options)
    return options


def _check(options: Options) -> None:
    """Every value of the right kind, told before any work is done.

    Raises:
        InputError: naming the option as the command line spells it.
    """
    for name, least in (("seed", 0), ("samples", 1), ("threads", 1), ("opset", 1)):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"--{name} is {value!r}; it must be a whole number from {least}")
    for name, texts in (("dim", options.dims), ("input-shape", options.input_shapes)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"--{name} is {texts!r}; give a list of texts, as on the command line")
    gates = options.gates
    for name, number in (("time", options.time), ("min-sqnr", gates.min_sqnr), ("min-speedup", gates.min_speedup)):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise InputError(f"--{name} is {number!r}; it must be a number")
    if options.time < 0:
        raise InputError(f"--time is {options.time:g}; it must be 0 (no timing) or more seconds")
    if options.verify not in VERIFY:
        raise InputError(f"--verify is {options.verify!r}; one of {', '.join(VERIFY)}")
    get_target(options.target)
    if gates.max_drop is not None:
        parse_drop(gates.max_drop, 1.0)
    if gates.max_size is not None:
        try:
            parse_size(gates.max_size, 1)
        except InputError as error:
            raise InputError(f"--max-size {error}") from error


def check_gates(options: Options, *, timed: bool = True) -> None:
    """Nothing is asked for that cannot be judged with what was given.

    Raises:
        InputError: a gate without its metric, a metric without data, ...
    """
    gates = options.gates
    with_data = options.data is not None or options.eval_data is not None
    if gates.max_drop is not None and options.metric is None:
        raise InputError(
            "--max-drop needs a metric to measure the drop of; give --metric accuracy or --metric file.py:function"
        )
    if options.metric is not None and not with_data:
        raise InputError("--metric needs data to be measured on; give --eval-data (or --data) with labels")
    if options.samples is not None and not with_data:
        raise InputError("--samples says how much of the data to use, and there is none; give --data")
    if gates.certify and gates.max_drop is None:
        raise InputError("--certify says how --max-drop is judged; give --max-drop too")
    if gates.min_speedup is not None and options.time == 0 and timed:
        raise InputError("--min-speedup has to time the models, and --time 0 forbids it; leave --time out")


def read_source(source: ModelLike, options: Options) -> tuple[ir.Model, ModelLike]:
    """The model, and what it was read from: standard input can be read only once, so it becomes bytes."""
    if str(source) != "-":
        return load(source, external_roots=options.external_roots), source
    data = read_stdin()
    try:
        return load(data, external_roots=options.external_roots), data
    except ModelError as error:
        raise ModelError(str(error).replace("the bytes given", "standard input")) from error


def as_metric(given: Any) -> Metric | None:
    """A metric from its name, ``module.py:function``, a callable, or None.

    Raises:
        InputError: as :func:`graphopt.gates.load_metric`.
    """
    if given is None or isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return load_metric(given)
    return Metric(getattr(given, "__name__", "metric"), given)


def load_samples(spec: Any, model: ir.Model, options: Options) -> tuple[Dataset, dict[str, Any]]:
    """The usable samples, after a dry run over all of them, and what to report of them.

    Raises:
        DataError: as :func:`graphopt.data.summarize`; with ``options.strict`` where any sample cannot be used.
    """
    inputs, _ = interface(model)
    dataset = data_module.load_data(spec, inputs, limit=options.samples, seed=options.seed, image=options.image)
    summary = data_module.summarize(dataset, inputs)
    if options.strict and summary.skipped:
        count, every = len(summary.skipped), len(dataset)
        raise DataError(
            f"{summary.skipped[0]} ({count} of {every} samples in {dataset.source} cannot be used); take them out, or "
            "leave out --strict"
        )
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
    must: Collection[str] = (),
    named: ModelLike | None = None,
    promise: Promise | None = None,
) -> Result:
    """The one road every model takes: load, data, passes, judging, gates, report.

    ``must`` names the passes that have to change something. ``named``: what to call the source where it is loaded
    already. ``promise``: that the result is not slower than the original; NothingDone where it is.
    """
    check_gates(options)
    metric = as_metric(options.metric)
    model, given = read_source(source, options)
    report = {**versions(verb, vars(options)), **blank(about(model, given if named is None else named))}
    first = requested(model, options)
    pipeline, must = [*first, *pipeline], [*must, *(p.name for p in first if p.name == "upgrade-opset")]
    context = make_context(facing(model, pipeline), options, report)
    context.progress(0, None, "running the passes")
    stages = Stages(pipeline, options.gates, metric, options.verify, must, options.search, options.time)
    result = stages.run(model, context)
    with told_or_forgotten(result.ledger):
        report["ledger"] = [entry.as_dict() for entry in result.ledger]
        something_done(result, pipeline, must, report)
        kept = stages.keep(result, context)
        report["sensitivity"] = damages(kept)
        report["ledger"] = [entry.as_dict() for entry in result.ledger]
        report["notes"] += narrowed(result, pipeline) + result.notes
        if promise is not None and promise.measures(options.target, options.time):
            _place(promise, result, pipeline, model, context, options, metric, report, kept)
        verdict = _judged(promise, result, model, context, options, metric, report)
        if promise is not None and promise.again(verdict, report["never_slower"], report["placement"]):
            _place(promise, result, pipeline, model, context, options, metric, report, kept, look=False)
            verdict = _judged(promise, result, model, context, options, metric, report)
        if kept is not None:
            report["floor"] = kept.floor()
            kept.warn(verdict.comparison, report["notes"])
        verdict.gates += stages.own
        report.update(verdict.as_dict())
        merge_notes(report["notes"], verdict.notes + untold(report["never_slower"]))
        report["reproducer"] = str(result.reproducer) if result.reproducer else None
        hold(verdict, result, report, strict=options.strict)
    return Result(result.model, report, model, result.as_ran(stages.pipeline), options)


def _judged(
    promise: Promise | None,
    result: RunResult,
    model: ir.Model,
    context: Context,
    options: Options,
    metric: Metric | None,
    report: dict[str, Any],
) -> Verdict:
    """``result`` against ``model``; ``report`` is told what it is, and whether the promise is kept."""
    report["output"] = about(result.model, None)
    context.progress(0, None, "comparing with the original")
    verdict = judge(
        model,
        result.model,
        context,
        options.gates,
        metric=metric,
        sizes=(report["input"]["bytes"], report["output"]["bytes"]),
        seconds=options.time,
        approximate=any(e.contract == "approximate" and e.changes for e in result.ledger),
        known=result.comparison,
    )
    if promise is not None:
        report["never_slower"] = promise.keep(verdict, model, result.model, context, options.gates, options.time)
    return verdict


def _place(
    promise: Promise,
    result: RunResult,
    pipeline: Pipeline,
    model: ir.Model,
    context: Context,
    options: Options,
    metric: Metric | None,
    report: dict[str, Any],
    kept: Kept | None,
    *,
    look: bool = True,
) -> None:
    """Look for the fastest mixture; ``result`` becomes it and ``report`` says how."""
    before = result.model
    found = promise.search(result, pipeline, model, context, options.gates, metric, options.time, kept=kept, look=look)
    if found is None:
        return
    gone = [] if report["placement"] is None else [told(report["placement"])]
    if kept is not None and result.model is not before:
        kept.again(result.model, found["left_in_float"])
        gone.append(kept.note)
    report["notes"] = [note for note in report["notes"] if note not in gone]
    report["placement"] = found
    report["ledger"] = [entry.as_dict() for entry in result.ledger]
    report["notes"].append(told(found))


def requested(model: ir.Model, options: Options) -> list[Pass]:
    """The passes behind ``opset``, ``dims``, ``input_shapes`` and ``fold_overridable``; see :func:`asked`."""
    return asked(
        model,
        to_opset=options.opset,
        dims=options.dims,
        input_shapes=options.input_shapes,
        fold_overridable=options.fold_overridable,
    )


def make_context(model: ir.Model, options: Options, report: dict[str, Any]) -> Context:
    """What passes may ask for: the data, loaded and checked (``report`` is told), and sweeps over it."""
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

    attach(context)
    return context
