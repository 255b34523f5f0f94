"""The last step to a device: an ONNX model in the form of another runtime, run there and compared."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt import data as data_module
from graphopt.conversion import child
from graphopt.conversion.agreement import MOST, RELATIVE, Sample, stored
from graphopt.conversion.front_ends import FrontEnd
from graphopt.errors import GateFailed, InputError
from graphopt.gates import GateResult
from graphopt.model import ModelLike, interface
from graphopt.outcome import with_report
from graphopt.pipeline import Options, load_samples, merge_options, read_source
from graphopt.remote import place, with_suffix
from graphopt.report.document import about, file_sha256, versions
from graphopt.session import Session, ort_form, runtime_version
from graphopt.storage import save, write_bytes
from graphopt.validation import Comparison, OutputDifference, output_noise, runnable_feeds

if TYPE_CHECKING:
    import onnx_ir as ir

TARGETS = {"ort": ".ort", "openvino": ".xml", "tflite": ".tflite"}
"""What ``--to`` takes -> how the file is called."""
_WORKERS = {
    "openvino": FrontEnd("OpenVINO", "to_openvino.py", "openvino", "openvino onnx", direction="to"),
    "tflite": FrontEnd("TensorFlow Lite", "to_tflite.py", "", "onnx2tf", direction="to"),
}
"""The runtimes that run in a process of their own."""
_SAMPLES = 4


def export(
    model: ModelLike,
    destination: str | os.PathLike[str],
    *,
    to: str,
    data: Any = None,
    python: str | os.PathLike[str] | None = None,
    max_abs: float | None = None,
    min_sqnr: float | None = None,
    timeout: float = 3600.0,
    **options: Any,
) -> dict[str, Any]:
    """Write ``model`` in the form of another runtime, after running it there and comparing with ONNX Runtime.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        destination: ``.ort``, ``.xml`` (OpenVINO; the weights go beside it into ``.bin``), ``.tflite``.
        to: a key of :data:`TARGETS`.
        data: inputs to compare on; None: legal random ones.
        python: an interpreter that has OpenVINO, or onnx2tf; None: this one.
        max_abs: what an output may differ by; None: the model's own noise, or 1e-4 of its largest value.
        min_sqnr: instead, the least SQNR of every output, in dB.
        timeout: seconds the other runtime's converter may take.
        options: ``samples``, ``seed``, ``threads``, ``external_roots``, ``progress``.

    Returns:
        The report.

    Raises:
        InputError: bad model, data or option, or the runtime is not installed.
        RuntimeFailure: the runtime cannot take the model.
        GateFailed: it computes something else there; nothing was written.
    """
    asked = {**options, "data": data, "min_sqnr": min_sqnr}
    merged = merge_options(asked, None)
    merged.settings = {"to": to, "python": python, "max_abs": max_abs, "timeout": timeout}
    _named(to, destination)
    loaded, source = read_source(model, merged)
    feeds, left_out = _feeds(loaded, merged)
    folder = Path(tempfile.mkdtemp(prefix="graphopt-export-"))
    started = time.perf_counter()
    try:
        if to == "ort":
            samples, answer = _ort(loaded, feeds, folder, merged)
        else:
            samples, answer = _elsewhere(to, loaded, feeds, folder, merged, python, timeout)
        report = _report(loaded, source, merged, answer, time.perf_counter() - started, to)
        report["notes"] += [f"WARNING: data: {text}, so it is left out" for text in left_out]
        _hold(loaded, samples, max_abs, merged, report)
        made = _made(to, folder)
        report["output"].update(
            path=str(destination), bytes=sum(path.stat().st_size for path in made), sha256=file_sha256(made[0])
        )
        for path in reversed(made):  # weights before what reads them
            write_bytes(with_suffix(destination, path.suffix), path.read_bytes())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _named(to: str, destination: str | os.PathLike[str]) -> None:
    if to not in TARGETS:
        raise InputError(f"unknown runtime '{to}'; one of {', '.join(TARGETS)} (docs/export.md says how to others)")
    if place(destination).suffix != TARGETS[to]:
        raise InputError(f"{destination}: a model for {to} is called *{TARGETS[to]}; name it so")


def _feeds(model: ir.Model, options: Options) -> tuple[list[dict[str, Any]], list[str]]:
    """The inputs to compare on, and which samples cannot be used."""
    inputs, _ = interface(model)
    count = options.samples or _SAMPLES
    if options.data is None:
        return [dict(feed) for feed in runnable_feeds(model, Session(model), count, seed=options.seed)], []
    dataset, described = load_samples(options.data, model, options)
    chosen = (sample for sample, _ in zip(dataset, range(count), strict=False))
    return [dict(data_module.feeds(sample, inputs)) for sample in chosen], described["skipped"]


def _ort(model: ir.Model, feeds: list[Any], folder: Path, options: Options) -> tuple[list[Sample], dict[str, Any]]:
    session = Session(ort_form(model, folder / "model.ort"), threads=options.threads)
    name = f"onnxruntime {runtime_version()}"
    return [(feed, session.run(feed)) for feed in feeds], {"framework": name, "converter": name, "notes": []}


def _elsewhere(
    to: str, model: ir.Model, feeds: list[Any], folder: Path, options: Options, python: Any, timeout: float
) -> tuple[list[Sample], dict[str, Any]]:
    worker = _WORKERS[to]
    if python is None and not worker.extra:
        raise InputError(
            f"the converter {worker.road} wants an environment of its own (it pins older packages than graphopt's); "
            f"make one (python -m venv env; env/bin/pip install {worker.packages}) and give --python env/bin/python"
        )
    save(model, folder / "model.onnx")
    named = {f"{k}/{name}": array for k, feed in enumerate(feeds) for name, array in feed.items()}
    if any(array.dtype == object for array in named.values()):
        raise InputError(f"the model takes text, which {worker.title} does not; export the part behind the tokenizer")
    np.savez(folder / "feeds.npz", **named)
    request: dict[str, Any] = {
        "source": str(folder / "model.onnx"), "kind": to, "function": None, "shapes": [], "opset": 0,
        "samples": len(feeds), "seed": 0, "data": str(folder / "feeds.npz"), "allow_code": False, "allow_pickle": False,
    }  # fmt: skip
    answer = child.run(worker, request, folder, python=python, timeout=timeout, progress=options.progress)
    return stored(folder / "samples.npz", answer["samples"]), answer


def _report(
    model: ir.Model, source: Any, options: Options, answer: dict[str, Any], seconds: float, to: str
) -> dict[str, Any]:
    inputs, outputs = interface(model)
    return {
        **versions("export", vars(options)),
        "input": about(model, source),
        "output": about(model, None),
        "source": {
            "kind": to,
            "title": "ONNX model",
            "framework": answer["framework"],
            "converter": answer["converter"],
            "seconds": seconds,
        },
        "inputs": [{"name": v.name, "type": str(v)} for v in inputs],
        "outputs": [{"name": v.name, "type": str(v)} for v in outputs],
        "comparison": None,
        "allowed": {},
        "gates": [],
        "notes": list(answer["notes"]),
        "exit_code": 0,
        "error": None,
    }


def _hold(
    model: ir.Model, samples: Iterable[Sample], max_abs: float | None, options: Options, report: dict[str, Any]
) -> None:
    """ONNX Runtime's outputs against the other runtime's."""
    pairs = list(samples)
    session = Session(model, threads=options.threads)
    differences = {name: OutputDifference(name) for name in session.output_names}
    for feed, found in pairs:
        for name, value in session.run(feed).items():
            differences[name].add(value, found[name])
    noise = output_noise(model, [feed for feed, _ in pairs[:1]], threads=options.threads)
    comparison = Comparison(list(differences.values()), len(pairs))
    allowed = {
        d.name: max(min(noise.get(d.name, 0.0), MOST * d.scale), RELATIVE * d.scale) if max_abs is None else max_abs
        for d in comparison.outputs
    }
    least = options.gates.min_sqnr
    far = [d for d in comparison.outputs if d.mismatch or (d.sqnr < least if least else d.max_abs > allowed[d.name])]
    report["comparison"], report["allowed"] = comparison.as_dict(), allowed
    worst = comparison.worst
    measured = "nothing to compare" if worst is None else worst.mismatch or f"'{worst.name}': {worst.max_abs:.3g}"
    asked = f"{least:g} dB" if least else "as ONNX Runtime" if max_abs is None else f"{max_abs:g}"
    report["gates"] = [GateResult("min-sqnr" if least else "max-abs", asked, measured, not far).as_dict()]
    if far:
        first = far[0]
        why = first.mismatch or f"max abs diff {first.max_abs:.3g}, SQNR {first.sqnr:.1f} dB"
        runtime = report["source"]["framework"]
        raise with_report(
            GateFailed(
                f"{runtime} does not compute what ONNX Runtime does: output '{first.name}': {why}; nothing was "
                "written; where that is near enough, --max-abs X or --min-sqnr DB says so"
            ),
            report,
        )


def _made(to: str, folder: Path) -> list[Path]:
    """What the converter wrote; the file that is named first."""
    return [folder / f"model{suffix}" for suffix in (TARGETS[to], *((".bin",) if to == "openvino" else ()))]
