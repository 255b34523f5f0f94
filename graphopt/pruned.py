"""``graphopt.prune``: what the command line does, as a function, and what it would do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.base import Context
from graphopt.errors import InputError
from graphopt.gates import parse_size
from graphopt.graph import opset
from graphopt.judge import timed_feeds
from graphopt.manager import PassManager
from graphopt.model import ModelLike, weight_bytes
from graphopt.passes.prune import Prune, left_alone, table
from graphopt.pipeline import Options, Result, check_gates, load_samples, make, merge_options, read_source, requested
from graphopt.presets import exact_passes, inline
from graphopt.registry import create
from graphopt.report.document import about, versions
from graphopt.report.units import seconds
from graphopt.search.pruning import Faster
from graphopt.session import Session
from graphopt.sparsified import refuse_channels, sparsify
from graphopt.target import get_target
from graphopt.timing import time_models
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
    latency: str | float | None = None,
    sparsity: str | float | None = None,
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
        size: the file that is left: ``"25MB"``, or a share.
        latency: the time that is left here, measured: ``"5ms"``, or a share (0.7). Give one of the four; with
            ``max_drop`` or ``min_sqnr`` alone, as much goes as keeps to those.
        sparsity: instead of channels, single connections: the share of zeros (0.5), or ``"2:4"``; without ``data`` the
            smallest weights go. See :func:`graphopt.sparsified.sparsify`.
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
    amounts = {"macs": macs, "ratio": ratio, "size": size, "latency": latency}
    if sparsity is not None:
        _lists(exclude, include)
        channels = {"importance": importance != "loss", "repair": repair != "auto", "multiple": multiple != 8}
        refuse_channels({**{k: v is not None for k, v in amounts.items()}, **channels, "allow_slower": allow_slower})
        return sparsify(model, sparsity, data=data, exclude=exclude, include=include, **options)
    settings = _settings(amounts, importance, repair, multiple, exclude, include)
    return _prune(model, data, settings, amounts, allow_slower, options)


def _prune(
    model: ModelLike,
    data: Any,
    settings: dict[str, Any],
    amounts: dict[str, Any],
    allow_slower: bool,
    options: dict[str, Any],
) -> Result:
    merged = merge_options({**options, "data": data}, None)
    if data is None and (settings["importance"] == "loss" or settings["repair"] != "none"):
        raise InputError(
            "prune weighs channels and repairs layers on samples; give --data samples.npz (keys = input names; no "
            "labels needed), or --importance l2 --repair none"
        )
    check_gates(merged)
    loaded, source = read_source(model, merged)
    merged.settings = {**settings, "size": amounts["size"], "latency": amounts["latency"], "allow_slower": allow_slower}
    step = _step(settings, amounts, loaded, source, merged)
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
    latency: str | float | None = None,
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
    amounts = {"macs": macs, "ratio": ratio, "size": size, "latency": latency}
    settings = _settings(amounts, importance, repair, multiple, exclude, include)
    loaded, source = read_source(model, merged)
    merged.settings = {**settings, "size": size, "latency": latency}
    if all(v is None for v in amounts.values()):
        settings |= {"left": 0.5}
    step = _step(settings, {**amounts, "latency": None if latency is None else 0.5}, loaded, source, merged)
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
    amounts: Mapping[str, Any],
    importance: str,
    repair: str,
    multiple: int,
    exclude: Sequence[str],
    include: Sequence[str],
) -> dict[str, Any]:
    """The options of the pass; ``size`` and ``latency`` are worked out later."""
    given = [f"--{key}" for key, value in amounts.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each say how much goes; give one")
    _lists(exclude, include)
    for name in ("macs", "ratio"):
        value = amounts[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1):
            raise InputError(f"--{name} is {value!r}; it must be a share between 0 and 1, e.g. 0.7")
    chosen: dict[str, Any] = {"importance": importance, "repair": repair, "multiple": multiple}
    chosen |= {"exclude": tuple(exclude), "include": tuple(include)}
    if amounts["macs"] is not None:
        chosen |= {"left": float(amounts["macs"]), "of": "macs"}
    if amounts["ratio"] is not None:
        chosen |= {"left": 1 - float(amounts["ratio"]), "of": "channels"}
    return chosen


def _lists(exclude: Sequence[str], include: Sequence[str]) -> None:
    for name, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise InputError(f"{name} is one string; give a list of patterns: [{patterns!r}]")


def _step(
    settings: dict[str, Any], amounts: Mapping[str, Any], model: ir.Model, source: ModelLike, options: Options
) -> Prune:
    """The pass that does what was asked for.

    Raises:
        InputError: nothing says how much, or the size or latency cannot be reached.
    """
    amount: dict[str, Any] = {}
    if amounts["size"] is not None:
        amount = {"left": _share_of_weights(amounts["size"], model, source), "of": "size"}
    elif amounts["latency"] is not None:
        amount = {"left": _share_of_time(amounts["latency"], model, options), "of": "latency"}
    elif "left" not in settings:
        if options.gates.max_drop is None and options.gates.min_sqnr is None:
            raise InputError(
                "say how much goes: --macs 0.7 (share of the MACs that is left), --ratio 0.3 (share of the channels "
                "that goes), --size 25MB, --latency 0.7 (share of the time that is left here), or --max-drop 1% (as "
                "much as that allows)"
            )
        amount = {"left": LEAST_LEFT, "search": True}
    if opset(model) == 0:
        raise InputError("the model imports no operator set that prune knows; it has nothing to remove")
    step = create("prune", {**settings, **amount})
    assert isinstance(step, Prune)
    return step


def _share_of_weights(size: Any, model: ir.Model, source: ModelLike) -> float:
    file, weights = about(model, source)["bytes"], weight_bytes(model)
    share: float = (parse_size(str(size), file) - (file - weights)) / max(weights, 1)
    if not 0 < share < 1:
        raise InputError(
            f"--size {size}: the model has {file} bytes, {weights} of them weights; ask for something in between"
        )
    return share


def _share_of_time(latency: Any, model: ir.Model, options: Options) -> float:
    """``latency`` as a share of what the model takes here; that is measured where it is in seconds."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(us|ms|s)?\s*", str(latency), re.IGNORECASE)
    try:
        number, unit = (float(found[1]), found[2]) if found else (0.0, None)
    except ValueError:
        number, unit = 0.0, None
    if isinstance(latency, bool) or number <= 0 or (unit is None and number >= 1):
        raise InputError(f"--latency is {latency!r}; give what is left of the time: 0.7, or 5ms, 800us")
    if options.time == 0 or not get_target(options.target).here:
        why = "--time 0 forbids it" if options.time == 0 else f"{options.target} is another machine"
        raise InputError(f"--latency has to time models, and {why}; give --macs or --size")
    if unit is None:
        return number
    context = Context(original=model, target=options.target, seed=options.seed, threads=options.threads)
    if options.data is not None:
        context.data, _ = load_samples(options.data, model, options)
    session = Session(model, threads=options.threads or 1, timed=True)
    timing, _ = time_models({"original": session}, timed_feeds(model, context), seconds=min(options.time, 1.0))
    wanted, taken = number * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[unit.lower()], timing["original"].median
    if wanted >= taken:
        raise InputError(f"--latency {latency}: the model takes {seconds(taken)} here already; ask for less")
    return wanted / taken
