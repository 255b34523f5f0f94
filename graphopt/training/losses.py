"""What training makes smaller, as ONNX nodes on the student's outputs.

* ``kl``: ``T^2 KL(softmax(t / T) || softmax(s / T))``, the mean over rows (Hinton, Vinyals and Dean 2015). Of an output
  that is a Softmax, the logarithm stands in for the logits: softmax forgets the difference.
* ``mse``: ``mean((s - t)^2) / var(t)``, the variance over all samples.
* ``cross-entropy``: with labels, the mean over rows.
* ``FILE.onnx``: the user's own graph; its inputs are named as student outputs, ``teacher/OUTPUT`` or labels, its only
  output is the loss, a scalar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphopt.autodiff.emit import Emitter
from graphopt.autodiff.specialize import inline, opset_of
from graphopt.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("auto", "kl", "mse", "cross-entropy")
TEACHER, LABEL = "teacher/", "label/"
LOSS = "graphopt//loss"
LABELS = ("label", "labels", "target", "y")


@dataclass(frozen=True)
class Pair:
    """A value of the student's and the teacher's it is to be like. ``softmax``: the student's is a Softmax."""

    student: str
    teacher: str
    softmax: bool = False
    inner: bool = False  # no output: matched by name


@dataclass(frozen=True)
class Term:
    """One summand: a kind or the path of a loss graph, and its weight."""

    kind: str
    weight: float = 1.0


def parse(texts: Sequence[str]) -> tuple[Term, ...]:
    """``kl``, ``cross-entropy:0.5``, ``my_loss.onnx`` -> terms.

    Raises:
        InputError: an unknown loss, or a weight that is no positive number.
    """
    terms = []
    for text in texts:
        kind, colon, number = text.rpartition(":")
        if not colon or (not number.replace(".", "", 1).isdigit()):
            kind, number = text, "1"
        if kind not in KINDS and not kind.endswith(".onnx"):
            raise InputError(
                f"unknown loss '{text}'; "
                + did_you_mean(kind, KINDS, f"one of {', '.join(KINDS)}, or a graph: loss.onnx (weight: kl:0.5)")
            )
        if float(number) <= 0:
            raise InputError(f"loss '{text}' has no weight; give a number above 0, as in {kind}:0.5")
        terms.append(Term(kind, float(number)))
    return tuple(terms)


@dataclass
class Objective:
    """The whole loss. ``variance``: of each teacher value over the samples; ``graphs``: loaded loss graphs by path."""

    terms: tuple[Term, ...]
    pairs: tuple[Pair, ...]
    temperature: float = 2.0
    variance: dict[str, float] = field(default_factory=dict)
    graphs: dict[str, onnx.ModelProto] = field(default_factory=dict)

    @property
    def inner(self) -> list[Pair]:
        """Pairs of values that are no outputs."""
        return [pair for pair in self.pairs if pair.inner]

    @property
    def labelled(self) -> bool:
        """Whether ``cross-entropy`` needs a label with each sample."""
        return any(term.kind == "cross-entropy" for term in self.terms)

    def label_inputs(self) -> list[str]:
        """Labels that loss graphs read, by their keys in the data."""
        outputs = {p.student for p in self.pairs} | {TEACHER + p.teacher for p in self.pairs}
        names = [i.name for g in self.graphs.values() for i in g.graph.input]
        return [name for name in names if name not in outputs]

    def attach(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the student that computes the loss, its only output. Teacher values and labels become inputs."""
        made = onnx.ModelProto()
        made.CopyFrom(model)
        self._write(made)
        return made

    def alone(self, opset: int) -> onnx.ModelProto:
        """The loss by itself: student values are inputs too."""
        made = helper.make_model(
            helper.make_graph([], "loss", [], []), opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )
        made.graph.input.extend(
            helper.make_tensor_value_info(pair.student, TensorProto.FLOAT, None) for pair in self.pairs
        )
        self._write(made)
        return made

    def _write(self, made: onnx.ModelProto) -> None:
        graph = made.graph
        taken = {name for node in graph.node for name in node.output} | {i.name for i in graph.input}
        e = Emitter(opset_of(made), taken, "graphopt//loss/")
        wanted: dict[str, int] = {}
        parts = []
        for term in self.terms:
            parts += [e.times(part, term.weight) for part in self._term(e, term, graph, wanted)]
        parts += [_mse(e, pair, self.variance.get(pair.teacher, 1.0)) for pair in self.inner]
        wanted |= {TEACHER + pair.teacher: TensorProto.FLOAT for pair in self.inner}
        total = e.reshape(e.total([e.reshape(part, ()) for part in parts]), ())
        graph.node.extend([*e.nodes, helper.make_node("Identity", [total], [LOSS])])
        graph.initializer.extend(e.initializers)
        present = {i.name for i in graph.input}
        graph.input.extend(
            helper.make_tensor_value_info(name, kind, None) for name, kind in wanted.items() if name not in present
        )
        del graph.output[:]
        graph.output.append(helper.make_tensor_value_info(LOSS, TensorProto.FLOAT, []))

    def _term(self, e: Emitter, term: Term, graph: onnx.GraphProto, wanted: dict[str, int]) -> list[str]:
        outputs = [pair for pair in self.pairs if not pair.inner]
        if term.kind.endswith(".onnx"):
            return [self._own(e, term.kind, graph, wanted)]
        if term.kind == "cross-entropy":
            wanted[LABEL] = TensorProto.FLOAT
            pair = outputs[0]
            chosen = e("Mul", e.constant(np.float32(-1)), e("Mul", _log_probability(e, pair.student, pair, 1), LABEL))
            return [e.reduce("ReduceMean", e.sum(chosen, [-1], keep=False), [0], keep=False)]
        found = []
        for pair in outputs:
            wanted[TEACHER + pair.teacher] = TensorProto.FLOAT
            soft = term.kind == "kl" or (term.kind == "auto" and pair.softmax)
            variance = self.variance.get(pair.teacher, 1.0)
            found.append(_kl(e, pair, self.temperature) if soft else _mse(e, pair, variance))
        return found

    def _own(self, e: Emitter, path: str, graph: onnx.GraphProto, wanted: dict[str, int]) -> str:
        body = self.graphs[path].graph
        known = {p.student for p in self.pairs} | {TEACHER + p.teacher for p in self.pairs}
        rename = {}
        for value in body.input:
            name = value.name if value.name in known else LABEL + value.name
            rename[value.name] = name
            if name not in {p.student for p in self.pairs}:
                wanted[name] = value.type.tensor_type.elem_type
        out = e.fresh("own")
        e.nodes.extend(inline(graph, body, rename, [out], e.fresh("own") + "/"))
        return out


def read_graph(path: str, opset: int) -> onnx.ModelProto:
    """A user's loss graph.

    Raises:
        InputError: it cannot be read, has not one output, or another operator set than the student.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # onnx and protobuf raise whatever they met
        raise InputError(f"cannot read the loss {path}: {type(error).__name__}; give an ONNX file") from error
    if len(model.graph.output) != 1:
        raise InputError(f"the loss {path} has {len(model.graph.output)} outputs; give it one, a scalar")
    if opset_of(model) != opset:
        raise InputError(
            f"the loss {Path(path).name} is of opset {opset_of(model)} and the student of {opset}; export it at {opset}"
        )
    return model


def _logits(e: Emitter, name: str, pair: Pair) -> str:
    """Logits, up to a constant per row."""
    return e("Log", e("Max", name, e.number(1e-8))) if pair.softmax else name


def _log_probability(e: Emitter, name: str, pair: Pair, temperature: float) -> str:
    return e("LogSoftmax", e.times(_logits(e, name, pair), 1 / temperature), axis=-1)


def _kl(e: Emitter, pair: Pair, temperature: float) -> str:
    target = _log_probability(e, TEACHER + pair.teacher, pair, temperature)
    found = _log_probability(e, pair.student, pair, temperature)
    rows = e.sum(e("Mul", e("Exp", target), e("Sub", target, found)), [-1], keep=False)
    return e.times(_mean(e, rows), temperature**2)


def _mse(e: Emitter, pair: Pair, variance: float) -> str:
    gap = e("Sub", pair.student, TEACHER + pair.teacher)
    return e.times(_mean(e, e("Mul", gap, gap)), 1 / max(variance, 1e-12))


def _mean(e: Emitter, name: str) -> str:
    return e("ReduceMean", e.reshape(name, [-1]), keepdims=0)


def one_hot(labels: NDArray[Any], classes: int) -> NDArray[np.float32]:
    """float32[rows, classes] of whole-number labels.

    Raises:
        InputError: one is no class.
    """
    flat = np.asarray(labels).reshape(-1)
    if flat.dtype.kind not in "iub" or ((flat < 0) | (flat >= classes)).any():
        raise InputError(f"labels must be whole numbers from 0 to {classes - 1} (the student's first output)")
    found: NDArray[np.float32] = np.eye(classes, dtype=np.float32)[flat]
    return found


def label_of(sample: Mapping[str, Any]) -> Any:
    """The label in a sample; None: it has none."""
    return next((sample[key] for key in LABELS if key in sample), None)
