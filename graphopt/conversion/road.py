"""The road of a conversion: recognise, convert in the framework's interpreter, tidy, compare with the framework."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.conversion import child, shapes
from graphopt.conversion.agreement import agree, parted, stored
from graphopt.conversion.front_ends import FRONT_ENDS
from graphopt.conversion.recognise import Source, recognise, refuse_what_runs
from graphopt.conversion.tidy import loosen, tidied
from graphopt.errors import GateFailed, InputError, RuntimeFailure
from graphopt.gates import GateResult
from graphopt.model import ValueSpec, interface
from graphopt.outcome import with_report
from graphopt.pipeline import Options, Result, merge_options
from graphopt.remote import local
from graphopt.report.document import about, file_sha256, versions

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.validation import Comparison

NEWEST_OPSET = 18
"""What converters are asked for unless told otherwise: tf2onnx and onnxmltools know no later one."""
_SAMPLES = 4
_SCRATCH = "graphopt.scratch"


def convert(
    source: str | os.PathLike[str],
    *,
    framework: str | None = None,
    input_shapes: Sequence[str] = (),
    data: str | os.PathLike[str] | None = None,
    python: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    allow_code: bool = False,
    max_abs: float | None = None,
    timeout: float = 3600.0,
    **options: Any,
) -> Result:
    """Convert ``source`` to ONNX with its framework's own converter, and compare the two on the same inputs.

    The framework runs in a child process, with the interpreter ``python`` (None: this one). That is no sandbox:
    ``module.py:function`` is run, and so is what a pickle or a TorchScript file holds once it is allowed.

    Args:
        source: a file or folder, recognised by its bytes and structure, or ``module.py:function``.
        framework: what it is (a key of :data:`FRONT_ENDS`), where that cannot be told or is told wrong.
        input_shapes: of sources that do not say what they take: ``x:N,3,224,224``, ``ids:1,16:int64``.
        data: an ``.npz`` with inputs, one sample per row, instead of random ones.
        allow_pickle: load a pickle.
        allow_code: load TorchScript, and Keras layers that carry code.
        max_abs: what an output may differ by; None: the model's own noise, or 1e-4 of its largest value.
        timeout: seconds the converter may take.
        options: ``opset``, ``samples``, ``seed``, ``threads``, ``progress``.

    Raises:
        InputError: the source is not recognised, is refused, or a package is missing; the message says which command
            installs it.
        ModelError: the converter wrote an invalid model.
        RuntimeFailure: the converter failed, or the runtime cannot run what it made.
        GateFailed: the converted model does not compute what the framework does; ``error.report`` has how far.
    """
    merged = merge_options({**options, "input_shapes": tuple(input_shapes)}, None)
    merged.settings = {
        "framework": framework, "data": data, "python": python, "allow_pickle": allow_pickle,
        "allow_code": allow_code, "max_abs": max_abs, "timeout": timeout,
    }  # fmt: skip
    found, request = _request(source, framework, data, merged, allow_pickle=allow_pickle, allow_code=allow_code)
    if max_abs is not None and not max_abs >= 0:
        raise InputError(f"--max-abs is {max_abs:g}; it must be 0 or more")
    scratch = _Scratch()
    started = time.perf_counter()
    answer = child.run(
        FRONT_ENDS[found.kind], request, scratch.path, python=python, timeout=timeout, progress=merged.progress
    )
    seconds = time.perf_counter() - started
    model, notes = tidied(scratch.path / "model.onnx", to_opset=merged.opset, converter=answer["converter"])
    model.meta[_SCRATCH] = scratch  # weights may lie in a file there: the folder goes with the model
    report = _report(source, found, model, merged, answer, seconds)
    report["notes"] += notes
    _compare(model, stored(scratch.path / "samples.npz", answer["samples"]), max_abs, merged, report)
    return Result(model, report)


def _request(
    source: str | os.PathLike[str],
    framework: str | None,
    data: str | os.PathLike[str] | None,
    options: Options,
    *,
    allow_pickle: bool,
    allow_code: bool,
) -> tuple[Source, dict[str, Any]]:
    """What the source is, and what its front end is told; refused here is what can be without starting it."""
    asked = shapes.parse(options.input_shapes)
    here = None if data is None else local(data)
    if here is not None and not here.is_file():
        raise InputError(f"no such file: {data}; --data is an .npz with inputs, one sample per row")
    found = recognise(os.fspath(source), framework)
    refuse_what_runs(found, allow_pickle=allow_pickle, allow_code=allow_code)
    return found, {
        "source": str(found.path.resolve()),
        "kind": found.kind,
        "function": found.function,
        "shapes": asked,
        "opset": options.opset or NEWEST_OPSET,
        "samples": options.samples or _SAMPLES,
        "seed": options.seed,
        "data": None if here is None else str(here.resolve()),
        "allow_code": allow_code,
        "allow_pickle": allow_pickle,
    }


class _Scratch:
    """A folder that goes when the last who holds this has gone."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="graphopt-convert-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _report(
    source: str | os.PathLike[str],
    found: Source,
    model: ir.Model,
    options: Options,
    answer: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    size, digest = _measured(found.path)
    inputs, outputs = interface(model)
    written = about(model, None)
    return {
        **versions("convert", vars(options)),
        "input": {
            **written,
            "path": os.fspath(source),
            "bytes": size,
            "sha256": digest,
        },
        "output": written,
        "source": {
            "kind": found.kind,
            "title": FRONT_ENDS[found.kind].title,
            "framework": answer["framework"],
            "converter": answer["converter"],
            "seconds": seconds,
        },
        "inputs": _ports(inputs),
        "outputs": _ports(outputs),
        "comparison": None,
        "allowed": {},
        "gates": [],
        "notes": list(answer["notes"]),
        "exit_code": 0,
        "error": None,
    }


def _ports(values: Sequence[ValueSpec]) -> list[dict[str, str]]:
    return [{"name": v.name, "type": str(v)} for v in values]


def _measured(path: Path) -> tuple[int, str]:
    """Bytes and hash of a file, or of a folder's files with their names."""
    if path.is_file():
        return path.stat().st_size, file_sha256(path)
    size, digest = 0, hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        size += file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode())
    return size, digest.hexdigest()


def _compare(
    model: ir.Model, samples: list[Any], max_abs: float | None, options: Options, report: dict[str, Any]
) -> None:
    if options.progress is not None:
        options.progress(0, None, "comparing with the framework")
    try:
        comparison, allowed, seen = agree(model, samples, max_abs=max_abs, threads=options.threads)
    except RuntimeFailure as error:
        converter = report["source"]["converter"]
        raise RuntimeFailure(f"what {converter} wrote does not run: {error}; nothing was written") from error
    report["comparison"], report["allowed"] = comparison.as_dict(), allowed
    report["notes"] += comparison.notes + loosen(model, seen)
    report["outputs"] = _ports(interface(model)[1])
    why = parted(comparison, allowed)
    report["gates"] = [_gate(comparison, why, max_abs).as_dict()]
    if why is not None:
        framework = report["source"]["framework"]
        raise with_report(
            GateFailed(
                f"the converted model does not compute what {framework} does: {why}; nothing was written; where that "
                "is near enough, --max-abs X says so"
            ),
            report,
        )


def _gate(comparison: Comparison, why: str | None, max_abs: float | None) -> GateResult:
    largest = max((o.max_abs for o in comparison.outputs), default=0.0)
    asked = "as the framework" if max_abs is None else f"{max_abs:g}"
    return GateResult("max-abs", asked, f"{largest:.3g}" if why is None else why, why is None)
