"""``graphopt.finetune``: a student is trained on its own graph until it does again what its teacher does."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from graphopt.errors import InputError, NothingDone
from graphopt.model import ModelLike, load
from graphopt.outcome import with_report
from graphopt.passes.finetune import Finetune
from graphopt.pipeline import Result, make, merge_options, read_source
from graphopt.presets import inline
from graphopt.registry import create

_NOT_HERE = ("WARNING: the file is no smaller", "WARNING: output '")
"""Warnings that are for what loses by being changed: a student is there to become another, of the same size."""

_TRAINING = {field.name: field.default for field in dataclasses.fields(Finetune) if field.name != "teacher"}


def finetune(model: ModelLike, *, teacher: ModelLike | None = None, data: Any = None, **options: Any) -> Result:
    """Train ``model`` on what ``teacher`` says of samples, without labels and without a training framework.

    Integer weights (QDQ) are trained as floats that are rounded on every step, and are integers again at the end.

    Args:
        model: the student, anything :func:`graphopt.model.load` takes; never mutated.
        teacher: the model it came from, or any other whose outputs are the same in name (or number) and shape.
        data: samples to train on, in any form :func:`graphopt.data.load_data` reads; a fifth of them decides when
            to stop. ``eval_data`` judges (without it a fifth is held back for that first).
        options: ``loss``, ``temperature``, ``match``, ``steps``, ``lr``, ``batch``, ``optimizer``, ``patience``,
            ``freeze``, ``scales``, ``checkpoint``, ``resume`` (see :class:`graphopt.passes.finetune.Finetune`);
            fields of :class:`graphopt.pipeline.Options`; and gates, which compare with ``model``.

    Raises:
        InputError: bad model, data or option, or an operator without a gradient rule.
        NothingDone: the result is not better than ``model`` on the judging samples, by the loss or the metric.
        GateFailed: a gate was not met.
    """
    if teacher is None:
        raise InputError("finetune needs a teacher to learn from; give --teacher ORIGINAL.onnx")
    if data is None:
        raise InputError("finetune needs samples to train on; give --data FILE (no labels needed)")
    settings = {name: _plain(name, options.pop(name, default)) for name, default in _TRAINING.items()}
    merged = merge_options({**options, "data": data}, None)
    step = create("finetune", settings)
    assert isinstance(step, Finetune)
    named = os.fspath(teacher) if isinstance(teacher, (str, os.PathLike)) else "(in memory)"
    merged.settings = {**settings, "teacher": named}
    loaded, source = read_source(model, merged)
    taught = step.taught_by(load(teacher, external_roots=merged.external_roots))
    pipeline = [*inline(loaded), create("fold-qdq-weights", {}), taught]
    result = make(loaded, pipeline, merged, verb="finetune", named=source, must=["finetune"])
    report = result.report
    report["notes"] = [n for n in report["notes"] if not n.startswith(_NOT_HERE)]
    metric = report["metric"]
    if metric is not None and not metric["difference"] > 0:
        raise with_report(
            NothingDone(
                f"training made nothing better: {metric['name']} {metric['original']:.4f} -> "
                f"{metric['candidate']:.4f} on the judging samples, though the loss fell; nothing was written"
            ),
            report,
        )
    return result


def _plain(name: str, value: Any) -> Any:
    """An option as a recipe has it: a path is text, a tuple a list.

    Raises:
        InputError: a single text where there are several.
    """
    if isinstance(_TRAINING[name], tuple):
        if isinstance(value, str):
            raise InputError(f"{name} is one string; give a list: [{value!r}]")
        return list(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value
