"""``graphopt.finetune``: a student is trained on its own graph until it does again what its teacher does."""

from __future__ import annotations

import os
from collections.abc import Sequence
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


def finetune(
    model: ModelLike,
    *,
    teacher: ModelLike | None = None,
    data: Any = None,
    loss: Sequence[str] = ("auto",),
    temperature: float = 2.0,
    match: Sequence[str] = (),
    steps: int = 300,
    lr: float = 3e-3,
    batch: int = 16,
    optimizer: str = "adam",
    patience: int = 6,
    freeze: Sequence[str] = (),
    scales: str = "weights",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Result:
    """Train ``model`` on what ``teacher`` says of samples, without labels and without a training framework.

    Integer weights (QDQ) are trained as floats that are rounded on every step, and are integers again at the end.

    Args:
        model: the student, anything :func:`graphopt.model.load` takes; never mutated.
        teacher: the model it came from, or any other whose outputs are the same in name (or number) and shape.
        data: samples to train on, in any form :func:`graphopt.data.load_data` reads; a fifth of them decides when
            to stop. ``eval_data`` judges (without it a fifth is held back for that first).
        loss, temperature, match, steps, lr, batch, optimizer, patience, freeze, scales, checkpoint, resume: options of
            the pass, see :class:`graphopt.passes.finetune.Finetune`.
        options: fields of :class:`graphopt.pipeline.Options`, and gates, which compare with ``model``.

    Raises:
        InputError: bad model, data or option, or an operator without a gradient rule.
        NothingDone: the result is not better than ``model`` on the judging samples, by the loss or the metric.
        GateFailed: a gate was not met.
    """
    for name, texts in (("loss", loss), ("match", match), ("freeze", freeze)):
        if isinstance(texts, str):
            raise InputError(f"{name} is one string; give a list: [{texts!r}]")
    if teacher is None:
        raise InputError("finetune needs a teacher to learn from; give --teacher ORIGINAL.onnx")
    if data is None:
        raise InputError("finetune needs samples to train on; give --data FILE (no labels needed)")
    settings = {
        "loss": list(loss),
        "temperature": temperature,
        "match": list(match),
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "optimizer": optimizer,
        "patience": patience,
        "freeze": list(freeze),
        "scales": scales,
        "checkpoint": str(checkpoint or ""),
        "resume": str(resume or ""),
    }
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
