"""The errors a user may meet. Each owns its exit code, so that the CLI and CI agree on what happened.

A message is one line: ``what is wrong (where); how to fix it``.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about a ``word`` nobody knows: the nearest known one, or ``otherwise``."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else otherwise


def command(*words: object) -> str:
    """A command as a message names it: it works when pasted, whatever stands in the paths."""
    import os
    import shlex
    import subprocess

    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


class ExitCode(IntEnum):
    """What the shell sees; documented in the README and stable."""

    DONE = 0
    GATE_FAILED = 1
    BAD_INPUT = 2
    NOTHING_DONE = 3
    INTERNAL = 4


class GraphoptError(Exception):
    """Base of every error graphopt raises on purpose."""

    exit_code: ExitCode = ExitCode.INTERNAL
    report: dict[str, Any] | None = None
    """What was measured before it was raised, where there is something (gates, nothing done)."""


class InputError(GraphoptError):
    """Bad usage or bad input: a file, an option, a recipe or data that cannot be used as given."""

    exit_code = ExitCode.BAD_INPUT


class ModelError(InputError):
    """The model file is broken, hostile, or not something graphopt can carry without loss."""


class DataError(InputError):
    """Calibration or evaluation data does not fit the model; the message names the sample and the input."""


class PreconditionError(InputError):
    """A pass cannot work on this graph; the message names the node and the remedy."""


class RuntimeFailure(GraphoptError):
    """ONNX Runtime (or a child process of ours) could not load or run a model.

    It is bad input when it happens to the user's own model, so it carries that exit code.
    """

    exit_code = ExitCode.BAD_INPUT


class OverBudget(GraphoptError):
    """A model asks for more memory, time or nodes than it may (:mod:`graphopt.budgets`).

    No :class:`InputError`, so that nobody takes it for a model that merely cannot be run here and goes on without.
    """

    exit_code = ExitCode.BAD_INPUT


class GateFailed(GraphoptError):
    """A gate or tolerance the user typed was not met; nothing was written."""

    exit_code = ExitCode.GATE_FAILED


class NothingDone(GraphoptError):
    """The work asked for did not happen (nothing eligible, nothing better); nothing was written."""

    exit_code = ExitCode.NOTHING_DONE


class InternalError(GraphoptError):
    """A bug in graphopt: please report it with the reproducer the message names."""
