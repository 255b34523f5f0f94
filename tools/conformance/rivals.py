"""The other simplifiers. Run by an interpreter that has them, as a child that answers one request after another.

A request is a pickled (function, arguments); an answer a pickled (True, what it returned) or (False, the error), after
its length in eight bytes. This file stands alone: nothing of graphopt needs to be there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

PACKAGES = {
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
    "onnxscript": "onnxscript",
    "ort-extended": "onnxruntime",
    "ort-all": "onnxruntime",
    "onnx-ir": "onnx-ir",
    "graphsurgeon": "onnx-graphsurgeon",
    "polygraphy": "polygraphy",
}
"""Each rival's distribution."""


def version(name: str) -> str | None:
    """Which version of a rival is there; None: it is not."""
    try:
        return importlib.metadata.version(PACKAGES[name])
    except importlib.metadata.PackageNotFoundError:
        return None


def run(name: str, data: bytes) -> tuple[bytes, bool]:
    """(a rival's answer to a model, whether it changed the model it was given)."""
    model = onnx.ModelProto.FromString(data)
    given = model.SerializeToString(deterministic=True)
    answer = RIVALS[name](model)
    after = answer.SerializeToString()
    return after, model.SerializeToString(deterministic=True) != given


def _onnxsim(model: onnx.ModelProto) -> Any:
    import onnxsim

    return onnxsim.simplify(model)[0]


def _onnxslim(model: onnx.ModelProto) -> Any:
    import onnxslim

    return onnxslim.slim(model)


def _onnxscript(model: onnx.ModelProto) -> Any:
    import onnxscript.optimizer

    return onnxscript.optimizer.optimize(model)


def _ort(model: onnx.ModelProto, level: str) -> Any:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _onnx_ir(model: onnx.ModelProto) -> Any:
    """Its passes that simplify; the others lay out, check or convert."""
    import onnx_ir
    from onnx_ir.passes import common

    held = onnx_ir.from_proto(model)
    for pass_ in (
        common.InlinePass(),
        common.ShapeInferencePass(),
        common.LiftConstantsToInitializersPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        held = pass_(held).model
    return onnx_ir.to_proto(held)


def _graphsurgeon(model: onnx.ModelProto) -> Any:
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(model)
    graph.fold_constants()
    graph.cleanup()
    return gs.export_onnx(graph)


def _polygraphy(model: onnx.ModelProto) -> Any:
    """What ``polygraphy surgeon sanitize --fold-constants --cleanup`` does."""
    import onnx_graphsurgeon as gs
    from polygraphy.backend.onnx import fold_constants

    graph = gs.import_onnx(fold_constants(model, copy=True))
    graph.cleanup()
    return gs.export_onnx(graph)


RIVALS: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "onnxscript": _onnxscript,
    "ort-extended": lambda model: _ort(model, "EXTENDED"),
    "ort-all": lambda model: _ort(model, "ALL"),
    "onnx-ir": _onnx_ir,
    "graphsurgeon": _graphsurgeon,
    "polygraphy": _polygraphy,
}


def serve() -> None:
    """Answer until the pipe closes. What the libraries print goes nowhere."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    here = {"version": version, "run": run}
    while True:
        try:
            function, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            module, _, name = function.rpartition(":")
            called = getattr(importlib.import_module(module), name) if module else here[name]
            answer: tuple[bool, Any] = (True, called(*arguments))
        except BaseException as error:  # a rival may even exit
            words = str(error).split() or [""]
            answer = (False, f"{type(error).__name__}: {' '.join(words)[:200]}")
        data = pickle.dumps(answer)
        answers.write(len(data).to_bytes(8, "big") + data)
        answers.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder has names that others use
    serve()
