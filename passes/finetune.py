"""Train a student on what a teacher says, on its ONNX graph: repairs what quantization or pruning lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import data as data_module
from graphopt.autodiff.emit import OLDEST
from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.data import split
from graphopt.errors import InputError, PreconditionError, did_you_mean
from graphopt.gates import Metric, measure
from graphopt.graph import opset
from graphopt.model import clone, fingerprint, interface, load
from graphopt.passes._pairing import matched, teaching, variances
from graphopt.passes._shadows import SCALES, Shadows, shadow
from graphopt.session import Session
from graphopt.training import Objective, Schedule, Trained, gather, train
from graphopt.training.checkpoint import Checkpoint
from graphopt.training.examples import stackable
from graphopt.training.losses import LOSS, parse, read_graph
from graphopt.training.optimizers import OPTIMIZERS
from graphopt.training.steps import Steps

if TYPE_CHECKING:
    from graphopt.data import Dataset
    from graphopt.training import Examples

_HELD = 0.2  # of the training samples, for early stopping
_LEAST = 10


@dataclass(frozen=True)
class Finetune(Pass):
    """Train weights (and their scales) so that the outputs come nearer to the teacher's.

    ``teacher``: a model file (default: the model this run started from). ``loss``: ``auto``, ``kl``, ``mse``,
    ``cross-entropy`` (labels), ``loss.onnx``, each with a weight if wanted (``kl:0.5``); ``auto`` is ``kl`` of a
    Softmax and ``mse`` of anything else. ``match``: ``student value=teacher value`` pairs to bring together too.
    ``lr``: relative to the size of each weight. ``freeze``: weights that stay, by their or their readers' names (globs)
    or operator types. ``scales``: which scales of what is quantized learn: ``none``, ``weights``, ``all``.
    ``checkpoint`` is written as it goes, ``resume`` read. The result is kept only where samples that neither trained
    nor stopped it are better, by the lower bound of a paired interval.
    """

    teacher: str = ""
    loss: tuple[str, ...] = ("auto",)
    temperature: float = 2.0
    match: tuple[str, ...] = ()
    steps: int = 300
    lr: float = 5e-3
    batch: int = 16
    optimizer: str = "adam"
    patience: int = 6
    freeze: tuple[str, ...] = ()
    scales: str = "weights"
    checkpoint: str = ""
    resume: str = ""
    name: ClassVar[str] = "finetune"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
        for option, known in (("optimizer", OPTIMIZERS), ("scales", SCALES)):
            value = getattr(self, option)
            if value not in known:
                hint = did_you_mean(str(value), known, f"one of {', '.join(known)}")
                raise ValueError(f"{option} is '{value}'; {hint}")
        for option in ("steps", "batch", "patience"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}; it must be 1 or more")
        for option in ("lr", "temperature"):
            if not 0 < getattr(self, option) < float("inf"):
                raise ValueError(f"{option} is {getattr(self, option)}; it must be a number above 0")
        try:
            parse(self.loss)
        except InputError as error:
            raise ValueError(str(error)) from error
        for text in self.match:
            if "=" not in text:
                raise ValueError(f"match is '{text}'; write STUDENT=TEACHER, two value names")

    def taught_by(self, teacher: ir.Model) -> Finetune:
        """This pass with a teacher in memory instead of ``teacher``."""
        made = dataclasses.replace(self)
        object.__setattr__(made, "_teacher", teacher)
        return made

    def check(self, model: ir.Model) -> None:
        if opset(model) < OLDEST:
            raise PreconditionError(
                f"gradients need opset {OLDEST} and the model has {opset(model)}; run upgrade-opset"
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if context.data is None:
            raise PreconditionError("finetune needs samples to train on; give --data FILE (no labels needed)")
        teacher = self._loaded_teacher(context)
        shadows = shadow(model, self.freeze, self.scales)
        result = PassResult(skipped=shadows.frozen)
        if not shadows.variables:
            result.skipped.append(Skip("(graph)", "there is nothing to train: no float or integer weight is left free"))
            return result
        objective = self._objective(model, teacher, context)
        fitted, kept, judging = _parts(context)
        training, held = self._examples(model, teacher, objective, context, fitted, kept)
        steps = Steps(objective.attach(shadows.proto), shadows.variables, context.threads)
        _batches(training, held, steps, self.batch)
        schedule = Schedule(self.steps, self.lr, self.batch, self.optimizer, self.patience, context.seed)
        mark = self._mark(model, teacher, context)
        trained = train(
            steps, training, held, schedule, context.progress, Checkpoint(self.checkpoint, self.resume, mark)
        )
        result.metrics = _told(trained, training, held, shadows)
        if trained.best_step == 0:
            result.skipped.append(_no_better(f"the loss of held-out samples never fell below its {trained.before:.4g}"))
            return result
        after = clone(model)
        written = shadow(after, self.freeze, self.scales).write(trained.values)
        verdict = self._judge(model, after, objective, teacher, context, judging)
        result.metrics |= verdict
        low, was, now = verdict["judged_low"], verdict["judged_before"], verdict["judged_after"]
        if not low > 0:
            result.skipped.append(_no_better(f"on the judging samples the loss went from {was:.4g} to {now:.4g}"))
            return result
        shadows.write(trained.values)
        what = f"loss {was:.4g} -> {now:.4g} on samples it never saw"
        result.changes = [Change("train", name, what) for name in written]
        return result

    def _loaded_teacher(self, context: Context) -> ir.Model:
        given = getattr(self, "_teacher", None)
        if given is not None:
            assert isinstance(given, ir.Model)
            return given
        return load(self.teacher, external_roots=context.external_roots) if self.teacher else context.original

    def _objective(self, model: ir.Model, teacher: ir.Model, context: Context) -> Objective:
        assert context.data is not None
        terms = parse(self.loss)
        graphs = {t.kind: read_graph(t.kind, opset(model)) for t in terms if t.kind.endswith(".onnx")}
        inputs = interface(model)[0]
        sample = next(iter(context.data))
        feeds = data_module.feeds(sample, inputs)
        pairs = matched(model, teacher, sample, feeds, self.match, context.threads)
        return Objective(terms, pairs, self.temperature, {}, graphs)

    def _examples(
        self,
        model: ir.Model,
        teacher: ir.Model,
        objective: Objective,
        context: Context,
        fitted: Dataset,
        kept: Dataset,
    ) -> tuple[Examples, Examples]:
        """(samples to train on, samples to stop on), with what the teacher says of each."""
        inputs = interface(model)[0]
        teach, classes = teaching(model, teacher, objective, context)
        total = len(fitted) + len(kept)
        done = 0

        def told(count: int) -> None:
            context.progress(done + count, total, "asking the teacher")

        training = gather(fitted, inputs, teach, objective, classes, told)
        done = len(fitted)
        held = gather(kept, inputs, teach, objective, classes, told)
        objective.variance = variances(training, objective)
        return training, held

    def _mark(self, model: ir.Model, teacher: ir.Model, context: Context) -> str:
        """What a checkpoint must have been made with."""
        assert context.data is not None
        options = {k: v for k, v in self.options().items() if k not in ("checkpoint", "resume", "teacher")}
        parts = [fingerprint(model), fingerprint(teacher), context.data.digest, json.dumps(options), str(context.seed)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _judge(
        self,
        before: ir.Model,
        after: ir.Model,
        objective: Objective,
        teacher: ir.Model,
        context: Context,
        dataset: Dataset,
    ) -> dict[str, Any]:
        """The loss of both students, as they would be written, on samples that neither trained nor stopped it."""
        inputs = interface(before)[0]
        teach, classes = teaching(before, teacher, objective, context)
        alone = Session(objective.alone(opset(before)), threads=1)
        taps = [pair.student for pair in objective.inner]
        sessions = [Session(m, threads=context.threads, taps=taps) for m in (before, after)]
        losses: list[list[dict[str, Any]]] = [[], []]
        judged = gather(
            dataset, inputs, teach, objective, classes, lambda n: context.progress(n, len(dataset), "judging")
        )
        for feeds in judged.feeds:
            for session, found in zip(sessions, losses, strict=True):
                said = session.run(feeds)
                found.append({"loss": float(alone.run({**feeds, **said}, [LOSS])[LOSS])})
        metric = Metric("loss", lambda outputs, _: -float(np.mean([o["loss"] for o in outputs])))
        result = measure(metric, losses[0], losses[1], [{} for _ in losses[0]], seed=context.seed)
        return {
            "judged_before": -result.original,
            "judged_after": -result.candidate,
            "judged_low": result.low,
            "judged_high": result.high,
            "judged_samples": result.samples,
        }


def _parts(context: Context) -> tuple[Dataset, Dataset, Dataset]:
    """(samples to train on, to stop on, to judge on), no sample in two of them.

    Raises:
        PreconditionError: there are too few.
    """
    data, judging = context.data, context.eval_data
    assert data is not None
    if len(data) < _LEAST:
        raise PreconditionError(
            f"finetune needs {_LEAST} samples or more, to train, stop and judge on different ones, and there are "
            f"{len(data)}; give more --data"
        )
    if judging is None or judging is data:  # too few for the run to hold some back
        data, judging, _ = split(data, _HELD, context.seed + 1, _LEAST)
    fitted, kept, _ = split(data, _HELD, context.seed, least=2)
    return fitted, kept, judging


def _batches(training: Examples, held: Examples, steps: Steps, batch: int) -> None:
    """Stack samples where that gives what they give one by one."""
    if batch == 1 or not (stackable(training) and stackable(held)):
        return
    group = max(training.groups, key=len)[:2]
    if len(group) < 2:
        training.batched = held.batched = True
        return
    single = np.mean([steps.loss(training.feeds[i]) for i in group])
    try:
        both = steps.loss(training.stacked(group))
    except Exception:  # the runtime refuses: the batch is fixed somewhere inside
        return
    if abs(both - single) <= 1e-2 * abs(single) + 1e-6:
        training.batched = held.batched = True


def _no_better(why: str) -> Skip:
    return Skip("(graph)", f"training made nothing better: {why}; the input is kept")


def _told(trained: Trained, training: Examples, held: Examples, shadows: Shadows) -> dict[str, Any]:
    """What the report says of the training."""
    return {
        "steps": trained.steps,
        "best_step": trained.best_step,
        "held_out_before": trained.before,
        "held_out_best": trained.best,
        "loss_curve": [list(item) for item in trained.losses],
        "seconds": trained.seconds,
        "seconds_per_step": trained.seconds_per_step,
        "steps_skipped": trained.skipped,
        "samples_trained": len(training),
        "samples_held_out": len(held),
        "samples_left_out": training.left_out + held.left_out,
        "samples_stacked": training.batched,
        "variables": len(shadows.variables),
        "weights_trained": shadows.weights,
    }
