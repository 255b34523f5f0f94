"""``graphopt.prune``: what the command line does, as a function, and what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graphopt.base import Context
from graphopt.errors import InputError
from graphopt.gates import parse_size
from graphopt.graph import opset
from graphopt.manager import PassManager
from graphopt.model import ModelLike, weight_bytes
from graphopt.passes.prune import Prune, left_alone, table
from graphopt.pipeline import Options, Result, check_gates, load_samples, make, merge_options, read_source, requested
from graphopt.presets import exact_passes, inline
from graphopt.registry import create
from graphopt.report.document import about, versions
from graphopt.search.pruning import Faster
from graphopt.validation import runnable

if TYPE_CHECKING:
    import onnx_ir as ir

LEAST_LEFT = 0.1
"""How much of the MACs is left at least where only a budget is given."""


def prune(
    model: ModelLike,
    *,
    data: Any = None,
    macs: float | None = None,
    ratio: float | None = None,
    size: str | float | None = None,
    importance: str = "loss",
    repair: str = "auto",
    multiple: int = 8,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    allow_slower: bool = False,
    **options: Any,
) -> Result:
    """Simplify, then remove channels, attention heads and hidden units, and refit the layers behind them.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        data: unlabelled samples, in any form :func:`graphopt.data.load_data` reads.
        macs: the share of multiply-accumulates that is left (0.7).
        ratio: the share of removable channels that goes (0.3).
        size: the file that is left: ``"25MB"``, or a share. Give one of the three; with ``max_drop`` or ``min_sqnr``
            alone, as much goes as keeps to those.
        importance: which channels go: ``loss``, ``l2`` or ``l1``.
        repair: ``auto``, ``asymmetric``, ``symmetric``, ``moments`` or ``none``.
        multiple: what is left of a layer comes in multiples of it.
        exclude: layers whose output channels stay: names, globs, ``re:`` expressions or operator types.
        include: the only layers whose output channels may go, likewise.
        allow_slower: hand the result over even where latency does not fall on this machine.
        options: fields of :class:`~graphopt.pipeline.Options`, and gates (``max_drop``, ``min_sqnr``, ``min_speedup``,
            ``max_size``).

    Raises:
        InputError: bad model, data or option.
        NothingDone: nothing can be removed, or latency does not fall; the message says why.
        GateFailed: a gate was not met.
    """
    merged = merge_options({**options, "data": data}, None)
    settings = _settings(macs, ratio, size, importance, repair, multiple, exclude, include)
    if data is None and (importance == "loss" or repair != "none"):
        raise InputError(
            "prune weighs channels and repairs layers on samples; give --data samples.npz (keys = input names; no "
            "labels needed), or --importance l2 --repair none"
        )
    check_gates(merged)
    loaded, source = read_source(model, merged)
    merged.settings = {**settings, "size": size, "allow_slower": allow_slower}
    step = _step(settings, size, loaded, source, merged)
    why = runnable(loaded) if data is not None else None
    if why is not None:
        raise InputError(f"prune has to run the model on samples and cannot: {why}; try --importance l2 --repair none")
    pipeline = [*inline(loaded), *exact_passes(), step]
    return make(
        loaded, pipeline, merged, verb="prune", named=source, must=["prune"], promise=Faster(allow_slower=allow_slower)
    )


def plan_pruning(
    model: ModelLike,
    *,
    data: Any = None,
    macs: float | None = None,
    ratio: float | None = None,
    size: str | float | None = None,
    importance: str = "loss",
    repair: str = "auto",
    multiple: int = 8,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Which groups of channels there are, what each is worth, and why some stay; nothing is removed.

    The exact passes run first, as they would. ``data`` tells the sizes of dynamic dims (else legal random inputs do).

    Raises:
        InputError: bad model or option.
        RuntimeFailure: shapes depend on data, and the model does not run.
    """
    merged = merge_options({**options, "data": data}, None)
    chosen = (macs, ratio, size if macs is None and ratio is None else None)
    settings = _settings(
        *(chosen if any(v is not None for v in chosen) else (0.5, None, None)),
        importance, repair, multiple, exclude, include,
    )  # fmt: skip
    loaded, source = read_source(model, merged)
    merged.settings = {**settings, "size": size}
    step = _step(settings, size, loaded, source, merged)
    pipeline = [*requested(loaded, merged), *inline(loaded), *exact_passes()]
    prepared = PassManager(pipeline, verify="off").run(loaded).model
    context = Context(original=loaded, target=merged.target, seed=merged.seed, threads=merged.threads)
    if merged.data is not None:
        context.data, _ = load_samples(merged.data, loaded, merged)
    step.check(prepared)
    gone = step.unmatched(prepared, context)
    channels = step.find(prepared, context)
    return {
        **versions("prune", vars(merged)),
        "dry_run": True,
        "input": about(loaded, source),
        "groups": table(channels),
        "skipped": [vars(skip) for skip in [*gone, *left_alone(channels)]],
    }


def _settings(
    macs: float | None,
    ratio: float | None,
    size: str | float | None,
    importance: str,
    repair: str,
    multiple: int,
    exclude: Sequence[str],
    include: Sequence[str],
) -> dict[str, Any]:
    """The options of the pass; ``size`` is worked out later."""
    given = [f"--{k}" for k, v in (("macs", macs), ("ratio", ratio), ("size", size)) if v is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each say how much goes; give one")
    for name, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise InputError(f"{name} is one string; give a list of patterns: [{patterns!r}]")
    for name, value in (("macs", macs), ("ratio", ratio)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1):
            raise InputError(f"--{name} is {value!r}; it must be a share between 0 and 1, e.g. 0.7")
    chosen: dict[str, Any] = {"importance": importance, "repair": repair, "multiple": multiple}
    chosen |= {"exclude": tuple(exclude), "include": tuple(include)}
    if macs is not None:
        chosen |= {"left": float(macs), "of": "macs"}
    if ratio is not None:
        chosen |= {"left": 1 - float(ratio), "of": "channels"}
    return chosen


def _step(
    settings: dict[str, Any], size: str | float | None, model: ir.Model, source: ModelLike, options: Options
) -> Prune:
    """The pass that does what was asked for.

    Raises:
        InputError: nothing says how much, or the size cannot be reached.
    """
    amount: dict[str, Any] = {}
    if size is not None:
        file, weights = about(model, source)["bytes"], weight_bytes(model)
        wanted = parse_size(str(size), file)
        share = (wanted - (file - weights)) / max(weights, 1)
        if not 0 < share < 1:
            raise InputError(
                f"--size {size}: the model has {file} bytes, {weights} of them weights; ask for something in between"
            )
        amount = {"left": share, "of": "size"}
    elif "left" not in settings:
        if options.gates.max_drop is None and options.gates.min_sqnr is None:
            raise InputError(
                "say how much goes: --macs 0.7 (share of the MACs that is left), --ratio 0.3 (share of the channels "
                "that goes), --size 25MB, or --max-drop 1% (as much as that allows)"
            )
        amount = {"left": LEAST_LEFT, "search": True}
    if opset(model) == 0:
        raise InputError("the model imports no operator set that prune knows; it has nothing to remove")
    step = create("prune", {**settings, **amount})
    assert isinstance(step, Prune)
    return step
