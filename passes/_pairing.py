"""Which value of the student is to be like which of the teacher, and what the teacher says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt import data as data_module
from graphopt.errors import InputError, PreconditionError, did_you_mean
from graphopt.graph import is_op
from graphopt.model import interface
from graphopt.session import Session
from graphopt.training import Objective, Pair
from graphopt.training.losses import TEACHER

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.base import Context
    from graphopt.training import Examples


def matched(
    student: ir.Model, teacher: ir.Model, sample: Any, feeds: Any, match: Sequence[str], threads: int | None
) -> tuple[Pair, ...]:
    """Pairs of float outputs, by name or (as many on both sides) by position, and those of ``match``.

    Raises:
        PreconditionError: no output is the student's and the teacher's, or a pair has two shapes; a name is unknown.
    """
    ours = [v.name for v in interface(student)[1] if v.dtype == np.float32]
    theirs = [v.name for v in interface(teacher)[1] if v.dtype == np.float32]
    common = [(name, name) for name in ours if name in theirs]
    if not common and len(ours) == len(theirs):
        common = list(zip(ours, theirs, strict=True))
    if not common:
        raise PreconditionError(
            f"student and teacher have no float output in common ({', '.join(ours) or 'none'} against "
            f"{', '.join(theirs) or 'none'}); give outputs the same names, or extract the part that fits"
        )
    makers = {v.name: v.producer() for v in student.graph.outputs}
    pairs = [Pair(a, b, softmax=_is_softmax(makers.get(a))) for a, b in common]
    for text in match:
        a, _, b = text.partition("=")
        for name, model, whose in ((a, student, "student"), (b, teacher, "teacher")):
            known = [v.name for node in model.graph for v in node.outputs if v.name]
            if name not in known:
                hint = did_you_mean(name, known, "see graphopt inspect --json")
                raise PreconditionError(f"match '{text}': the {whose} has no value '{name}'; {hint}")
        pairs.append(Pair(a, b, inner=True))
    said = Session(student, threads=threads, taps=[p.student for p in pairs if p.inner]).run(feeds)
    told = _teacher_session(teacher, pairs, threads).run(_teacher_feeds(sample, teacher))
    for pair in pairs:
        mine, other = said[pair.student].shape, told[pair.teacher].shape
        if mine != other:
            raise PreconditionError(
                f"'{pair.student}' of the student is {list(mine)} and '{pair.teacher}' of the teacher {list(other)}; "
                "match values of one shape"
            )
    return tuple(pairs)


def _is_softmax(node: ir.Node | None) -> bool:
    """Whether a value is a Softmax, perhaps behind operators that keep it."""
    while node is not None and is_op(node, "Identity", "DequantizeLinear", "QuantizeLinear"):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return is_op(node, "Softmax")


def _teacher_session(teacher: ir.Model, pairs: Sequence[Pair], threads: int | None) -> Session:
    return Session(teacher, threads=threads, taps=[pair.teacher for pair in pairs if pair.inner])


def _teacher_feeds(sample: Any, teacher: ir.Model) -> Any:
    try:
        return data_module.feeds(sample, interface(teacher)[0])
    except InputError as error:
        raise InputError(f"the teacher cannot take the samples: {error}") from error


def teaching(
    student: ir.Model, teacher: ir.Model, objective: Objective, context: Context
) -> tuple[Callable[[Any], dict[str, Any]], int | None]:
    """(sample -> the teacher's values, classes of the student's first output)."""
    session = _teacher_session(teacher, objective.pairs, context.threads)
    names = [pair.teacher for pair in objective.pairs]

    def teach(sample: Any) -> dict[str, Any]:
        return session.run(_teacher_feeds(sample, teacher), names)

    shape = next((v.shape for v in interface(student)[1] if v.name == objective.pairs[0].student), None)
    last = shape[-1] if shape else None
    return teach, last if isinstance(last, int) else None


def variances(examples: Examples, objective: Objective) -> dict[str, float]:
    """The variance of each teacher value over all samples."""
    found = {}
    for pair in objective.pairs:
        parts = [example[TEACHER + pair.teacher].astype(np.float64) for example in examples.feeds]
        count = sum(part.size for part in parts)
        mean = sum(float(part.sum()) for part in parts) / max(count, 1)
        found[pair.teacher] = sum(float(np.square(part - mean).sum()) for part in parts) / max(count, 1)
    return found
