"""graphopt: make ONNX models smaller and faster, and prove that they still do their job.

    result = graphopt.quantize("model.onnx", data="calibration.npz")
    result.report     # what happened and why; the same object --json prints
    result.save("model.int8.onnx")

Everything is imported on first use, so that ``import graphopt`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = (
    "optimize",
    "quantize",
    "compress",
    "prune",
    "unpack",
    "compare",
    "convert",
    "bench",
    "bisect",
    "diff",
    "extract",
    "finetune",
    "run",
    "tune",
    "sensitivity",
    "inspect",
    "lint",
    "lock",
    "Result",
    "CompareResult",
    "Diff",
    "Bisection",
)
_ERRORS = (
    "GraphoptError",
    "InputError",
    "ModelError",
    "DataError",
    "GateFailed",
    "NothingDone",
    "OverBudget",
    "RuntimeFailure",
)
_ELSEWHERE = {
    "simplify": "graphopt.drop_in",
    "export": "graphopt.exporting",
    "limits": "graphopt.budgets",
}

if TYPE_CHECKING:
    from graphopt.api import Bisection as Bisection
    from graphopt.api import CompareResult as CompareResult
    from graphopt.api import Diff as Diff
    from graphopt.api import Result as Result
    from graphopt.api import bench as bench
    from graphopt.api import bisect as bisect
    from graphopt.api import compare as compare
    from graphopt.api import compress as compress
    from graphopt.api import convert as convert
    from graphopt.api import diff as diff
    from graphopt.api import extract as extract
    from graphopt.api import finetune as finetune
    from graphopt.api import inspect as inspect
    from graphopt.api import lint as lint
    from graphopt.api import lock as lock
    from graphopt.api import optimize as optimize
    from graphopt.api import prune as prune
    from graphopt.api import quantize as quantize
    from graphopt.api import run as run
    from graphopt.api import sensitivity as sensitivity
    from graphopt.api import tune as tune
    from graphopt.api import unpack as unpack
    from graphopt.budgets import limits as limits
    from graphopt.drop_in import simplify as simplify
    from graphopt.errors import DataError as DataError
    from graphopt.errors import GateFailed as GateFailed
    from graphopt.errors import GraphoptError as GraphoptError
    from graphopt.errors import InputError as InputError
    from graphopt.errors import ModelError as ModelError
    from graphopt.errors import NothingDone as NothingDone
    from graphopt.errors import OverBudget as OverBudget
    from graphopt.errors import RuntimeFailure as RuntimeFailure
    from graphopt.exporting import export as export


def __getattr__(name: str) -> Any:
    import importlib

    if name in _API:
        return getattr(importlib.import_module("graphopt.api"), name)
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    if name in _ERRORS:
        return getattr(importlib.import_module("graphopt.errors"), name)
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API, *_ELSEWHERE, *_ERRORS])
