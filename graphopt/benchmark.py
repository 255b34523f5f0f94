"""``graphopt.bench``: models timed against each other on this machine, and where their time goes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from graphopt import data as data_module
from graphopt.errors import InputError, RuntimeFailure
from graphopt.model import clone, interface
from graphopt.pipeline import Options, load_samples, merge_options, read_source
from graphopt.profiling import profile as profile_model
from graphopt.report.document import about, versions
from graphopt.session import Session
from graphopt.timing import time_models, usable_cpus
from graphopt.validation import random_feeds

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.model import ModelLike
    from graphopt.session import Feeds

_SAMPLES = 4
"""Samples that are run in turn where nobody says how many: more than one, so that no cache knows the answer."""


def bench(
    models: ModelLike | Sequence[ModelLike],
    *,
    data: Any = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    profile: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Time models against each other, interleaved, on one thread and on all.

    Args:
        models: one model, or several that take the same inputs; ratios are to the first.
        data: samples to run; None: legal random ones.
        input_shapes: for random inputs, the shape of each input that has dims of any size: ``{"x": (1, 3, 224, 224)}``.
        profile: also measure what each node takes, on one thread (or on ``threads``).
        options: ``time`` (seconds of timing for each number of threads), ``threads`` (only this many), ``samples``,
            ``image``, ``seed``, ``external_roots``, ``progress``.

    Raises:
        InputError: bad model, data or option; models that do not take the same inputs.
        RuntimeFailure: a model does not run on these inputs.
    """
    merged = merge_options({**options, "data": data}, None)
    if merged.time == 0:
        raise InputError("--time 0 leaves nothing to do; give the seconds to time for, or leave it out")
    if data is not None and input_shapes:
        raise InputError("--input-shape is for random inputs and --data has shapes of its own; give one of them")
    several = models if isinstance(models, (list, tuple)) else [models]
    if not several:
        raise InputError("no model to time; name at least one")
    merged.settings = {"input_shapes": {k: list(v) for k, v in (input_shapes or {}).items()}, "profile": profile}
    read = [read_source(model, merged) for model in several]
    loaded = [model for model, _ in read]
    same_inputs(loaded, [f"model {index + 1}" for index in range(len(loaded))])
    report: dict[str, Any] = {
        **versions("bench", vars(merged)),
        "models": [about(model, source) for model, source in read],
        "data": None,
        "notes": [],
    }
    report["options"]["input_shapes"] = dict(merged.settings["input_shapes"])
    feeds, report["data"] = _feeds(loaded[0], merged, input_shapes or {})
    report["inputs"] = [
        {"name": name, "type": str(array.dtype), "shape": list(array.shape)} for name, array in feeds[0].items()
    ]
    report["timings"] = [_timed(loaded, feeds, threads, merged) for threads in _thread_counts(merged)]
    report["profiles"] = _profiles(loaded, feeds, merged) if profile else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > usable_cpus() + 0.5:  # what has just been timed is part of it
        report["notes"].append(f"WARNING: this machine is busy (load {load:.1f}); medians say little, ratios still do")
    report["exit_code"], report["error"] = 0, None
    return report


def same_inputs(models: Sequence[ir.Model], names: Sequence[str]) -> None:
    """Raise InputError where ``models``, called ``names``, do not all take the same inputs."""
    wanted = [{spec.name: None for spec in interface(model)[0]} for model in models]
    for name, inputs in zip(names, wanted, strict=True):
        if sorted(inputs) != sorted(wanted[0]):
            raise InputError(
                f"{names[0]} has the inputs {', '.join(wanted[0])} and {name} {', '.join(inputs)}; only models that "
                "take the same inputs can be compared"
            )


def _feeds(
    model: ir.Model, options: Options, shapes: Mapping[str, Sequence[int]]
) -> tuple[Sequence[Feeds], dict[str, Any]]:
    """What all models are fed, and what to report of it."""
    if options.data is not None:
        dataset, described = load_samples(options.data, model, options)
        inputs, _ = interface(model)
        chosen = dataset if options.samples is not None else dataset.take(_SAMPLES)
        return [data_module.feeds(sample, inputs) for sample in chosen], described
    count = options.samples or _SAMPLES
    feeds = random_feeds(shaped(model, shapes), count, seed=options.seed)
    described = {"source": "random", "samples": count, "synthetic": True, "sha256": None, "skipped": [], "notes": []}
    return feeds, described


def shaped(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> ir.Model:
    """A copy of ``model`` whose inputs have these shapes.

    Raises:
        InputError: no such input, or a shape that it cannot have.
    """
    import onnx_ir as ir

    model = clone(model)
    specs = {spec.name: spec for spec in interface(model)[0]}
    for name, shape in shapes.items():
        spec = specs.get(name)
        if spec is None:
            raise InputError(f"--input-shape {name}: no such input; the inputs are {', '.join(specs)}")
        wanted = f"--input-shape {name}:{','.join(map(str, shape))} does not fit {spec}"
        if any(isinstance(dim, bool) or not isinstance(dim, int) or dim < 1 for dim in shape):
            raise InputError(f"{wanted}; give whole numbers from 1, as in {name}:1,3,224,224")
        if spec.shape is not None and len(spec.shape) != len(shape):
            raise InputError(f"{wanted}; give {len(spec.shape)} numbers")
        for have, given in zip(spec.shape or (), shape, strict=False):
            if isinstance(have, int) and have != given:
                raise InputError(f"{wanted}; {have} is fixed in the model")
        value = next(v for v in model.graph.inputs if v.name == name)
        value.shape = ir.Shape(shape)
    return model


def _thread_counts(options: Options) -> list[int]:
    return [options.threads] if options.threads is not None else sorted({1, usable_cpus()})


def _timed(models: Sequence[ir.Model], feeds: Sequence[Feeds], threads: int, options: Options) -> dict[str, Any]:
    """One table: every model with this many threads."""
    if options.progress is not None:
        options.progress(0, None, f"timing on {threads} thread{'s' if threads > 1 else ''}")
    sessions = {str(index): Session(model, threads=threads, timed=True) for index, model in enumerate(models)}
    for name, session in sessions.items():
        _tried(session, feeds, int(name) + 1, options)
    found, ratios = time_models(sessions, feeds, seconds=options.time)
    return {
        "threads": threads,
        "results": [
            {
                **asdict(found[name]),
                "ratio": dict(zip(("median", "low", "high"), ratios[name], strict=True)) if name in ratios else None,
            }
            for name in sessions
        ],
    }


def _tried(session: Session, feeds: Sequence[Feeds], number: int, options: Options) -> None:
    """Run every feed once: what fails is told with what helps."""
    try:
        for feed in feeds:
            session.run(feed)
    except RuntimeFailure as error:
        if options.data is not None:
            raise InputError(f"model {number} does not run on the data: {error}; give --data that it takes") from error
        shapes = "; ".join(f"{name}:{','.join(map(str, array.shape))}" for name, array in feeds[0].items())
        raise InputError(
            f"model {number} does not run on random inputs ({shapes}): {error}; give --input-shape name:1,3,224,224, "
            "or --data"
        ) from error


def _profiles(models: Sequence[ir.Model], feeds: Sequence[Feeds], options: Options) -> list[dict[str, Any]]:
    found = []
    for index, model in enumerate(models):
        if options.progress is not None:
            options.progress(index, len(models), "profiling")
        times, runs = profile_model(model, feeds, threads=options.threads or 1, seconds=min(options.time, 2.0))
        total = sum(one.seconds for one in times)
        nodes = [one.as_dict(total) for one in times]
        found.append({"threads": options.threads or 1, "runs": runs, "seconds": total, "nodes": nodes})
    return found
