"""Who makes a model of a model: each pass alone, the default pipeline, the other simplifiers."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import onnx

import graphopt
from graphopt import registry
from graphopt.base import Context, Pass
from graphopt.errors import GraphoptError, RuntimeFailure
from graphopt.manager import PassManager
from graphopt.model import to_bytes, to_proto
from graphopt.passes import simplify
from tools.conformance.judging import Finding, Reference, serialized
from tools.conformance.rivals import PACKAGES
from tools.conformance.worker import LIMIT, PATIENCE, TookTooLong, Worker

ROUNDING = {"fuse-batchnorm", "fuse-into-conv", "matmul-to-gemm", "simplify", "upgrade-opset"}
"""Passes that may move a float by rounding; all others must leave every bit."""
ASKED_FOR = {"inline-functions": {"grown"}, "upgrade-opset": {"grown", "versions"}}
"""What a pass is there for, and runs on request only."""


@dataclass(frozen=True)
class Answer:
    """What became of a model: the new one (None: the contestant says that it changed nothing), or why there is none."""

    model: onnx.ModelProto | None = None
    finding: Finding | None = None
    mutated: bool = False
    undone: str = ""
    """What verification found wrong and took back, for information."""


class Contestant(Protocol):
    """Anything that can be held to the columns."""

    name: str
    rounding: bool

    @property
    def version(self) -> str:
        """What to print beside the name."""

    def answer(self, reference: Reference) -> Answer:
        """Its model."""


class _Hang(BaseException):
    """Not an Exception: nothing on the way may take it for a failure of its own."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what takes more CPU, or :data:`PATIENCE` times as long by the clock.

    Raises:
        TookTooLong: it did.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Hang

    limits = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE * seconds)}
    before = {number: signal.signal(number, stop) for number in limits}
    for timer, limit in limits.values():
        signal.setitimer(timer, limit)
    try:
        yield
    except _Hang:
        raise TookTooLong(f"it took longer than {seconds:g} s and was stopped") from None
    finally:
        for number, (timer, _) in limits.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def _guarded(act: Callable[[], Answer]) -> Answer:
    try:
        with at_most(LIMIT), _kept_child():
            return act()
    except TookTooLong as error:
        return Answer(finding=("hang", str(error)))
    except Exception as error:
        kind = "" if isinstance(error, GraphoptError) else f"{type(error).__name__}: "
        return Answer(finding=("crashed", kind + " ".join(str(error).split())[:200]))


@cache
def _own() -> Worker:
    return Worker(sys.executable)


@contextlib.contextmanager
def _kept_child() -> Iterator[None]:
    """Let `simplify` call onnxsim in a child that is kept, instead of a new one each time (a second apiece)."""

    def in_kept_child(function: Callable[..., Any], *arguments: Any, timeout: float, memory: int | None = None) -> Any:
        del memory  # the kept child has its own limit
        return _own().call(f"{function.__module__}:{function.__qualname__}", *arguments, limit=min(timeout, LIMIT))

    before = simplify.in_child
    simplify.in_child = in_kept_child
    try:
        yield
    finally:
        simplify.in_child = before


class OnePass:
    """A pass of ours by itself, not verified."""

    version = ""

    def __init__(self, pass_: Pass) -> None:
        self.pass_ = pass_
        self.name = pass_.name
        self.rounding = pass_.name in ROUNDING

    def answer(self, reference: Reference) -> Answer:
        """Its model."""
        return _guarded(lambda: self._answer(reference))

    def _answer(self, reference: Reference) -> Answer:
        model, given = reference.loaded
        result = PassManager([self.pass_], verify="off").run(model, Context(original=model, threads=1))
        entry = result.ledger[0]
        if entry.reproducer is not None:
            shutil.rmtree(entry.reproducer, ignore_errors=True)
        if entry.status == "reverted":
            return Answer(finding=("crashed", str(entry.reason)))
        after = to_proto(result.model) if entry.changes else reference.round_trip
        return Answer(after, mutated=to_bytes(model) != given)


class Pipeline:
    """``graphopt.optimize`` as users get it, but for the timing, which changes nothing in the model."""

    name = "pipeline"
    rounding = True
    version = graphopt.__version__

    def answer(self, reference: Reference) -> Answer:
        """Its model."""
        return _guarded(lambda: self._answer(reference))

    def _answer(self, reference: Reference) -> Answer:
        model = onnx.ModelProto.FromString(reference.data)
        result = graphopt.optimize(model, time=0, threads=1)
        undone = []
        for entry in result.report["ledger"]:
            if entry["reproducer"]:
                shutil.rmtree(entry["reproducer"], ignore_errors=True)
            if "reverted" in entry["status"]:
                undone.append(f"{entry['pass']} {entry['reason']}")
        return Answer(result.model, mutated=serialized(model) != reference.data, undone="; ".join(undone))


class Rival:
    """Another simplifier, in a child of its own environment."""

    rounding = True

    def __init__(self, name: str, worker: Worker) -> None:
        self.name, self._worker = name, worker
        self._version: str | None = worker.call("version", name)

    @property
    def there(self) -> bool:
        """Whether its package is installed there."""
        return self._version is not None

    @property
    def version(self) -> str:
        """Its package's version."""
        return self._version or "not installed"

    def answer(self, reference: Reference) -> Answer:
        """Its model."""
        try:
            data, mutated = self._worker.call("run", self.name, reference.data)
            return Answer(onnx.ModelProto.FromString(data), mutated=mutated)
        except TookTooLong as error:
            return Answer(finding=("hang", str(error)))
        except RuntimeFailure as error:
            return Answer(finding=("crashed", str(error)))
        except Exception as error:  # what it answered is no model
            return Answer(finding=("invalid", " ".join(str(error).split())[:200]))


def exact_passes() -> list[str]:
    """The passes held to their word here: those that need no calibration data and leave what a model takes."""
    passes = {name: registry.get(name) for name in registry.PASSES if name != "smooth"}
    return [name for name, found in passes.items() if found.contract == "exact" and not found.narrows]


def contestant(name: str, rival_python: Path | None) -> Contestant:
    """By name: ``pipeline``, one of :data:`rivals.PACKAGES`, or a pass."""
    if name == "pipeline":
        return Pipeline()
    if name in PACKAGES:
        return Rival(name, _rivals(str(rival_python or sys.executable)))
    return OnePass(registry.create(name, {}))


@cache
def _rivals(python: str) -> Worker:
    return Worker(python)
