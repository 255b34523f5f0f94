"""Zeros in weights (``graphopt.prune(sparsity=...)``), and an honest word on what they bring: bytes, speed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import InputError
from graphopt.graph import opset
from graphopt.model import ModelLike
from graphopt.package import pack
from graphopt.pipeline import Result, check_gates, make, merge_options, read_source
from graphopt.presets import exact_passes, inline
from graphopt.registry import create
from graphopt.report.units import ratio, size
from graphopt.storage import save

if TYPE_CHECKING:
    import onnx_ir as ir


def refuse_channels(given: Mapping[str, Any]) -> None:
    """Raise InputError where ``given`` holds, beside sparsity, an option that is about whole channels."""
    for name, value in given.items():
        if value:
            raise InputError(
                f"--sparsity takes single connections out of layers that keep their size, --{name.replace('_', '-')} "
                "is about whole channels; leave one out, or prune twice"
            )


def sparsify(
    model: ModelLike,
    sparsity: str | float,
    *,
    data: Any = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    **options: Any,
) -> Result:
    """Simplify, then set that share of every layer's weights to zero; see :class:`~graphopt.passes.sparsify.Sparsify`.

    The report's notes say what it brings: bytes in transport, and time here.

    Raises:
        InputError: bad model, data or option.
        NothingDone: no layer has connections that can go; the message says why.
        GateFailed: a gate was not met.
    """
    merged = merge_options({**options, "data": data}, None)
    if isinstance(sparsity, bool) or not isinstance(sparsity, (str, int, float)):
        raise InputError(f"--sparsity is {sparsity!r}; give the share of zeros, 0.5, or 2:4")
    try:
        step = create("sparsify", {"sparsity": str(sparsity), "exclude": tuple(exclude), "include": tuple(include)})
    except InputError as error:
        raise InputError(str(error).replace("pass 'sparsify': sparsity is", "--sparsity is")) from error
    check_gates(merged)
    loaded, source = read_source(model, merged)
    if opset(loaded) == 0:
        raise InputError("the model imports no operator set that prune knows; it has nothing to remove")
    merged.settings = {"sparsity": str(sparsity), "exclude": tuple(exclude), "include": tuple(include)}
    pipeline = [*inline(loaded), *exact_passes(), step]
    result = make(loaded, pipeline, merged, verb="prune", named=source, must=["sparsify"])
    _tell(result, loaded, str(sparsity), merged.progress)
    return result


def _tell(result: Result, original: ir.Model, sparsity: str, progress: Callable[..., None] | None) -> None:
    """Enter in the report what the zeros bring."""
    report = result.report
    entry = next(e for e in report["ledger"] if e["pass"] == "sparsify")
    # A zero takes as many bytes as any other number, so that this is no surprise; what counts is told below.
    report["notes"] = [note for note in report["notes"] if not note.startswith("WARNING: the file is no smaller")]
    if progress is not None:
        progress(0, None, "packing")
    try:
        before, after = (_packed(one) for one in (original, result.ir_model))
    except InputError as error:
        report["notes"].append(f"what the zeros save in transport was not measured: {error}")
    else:
        entry["metrics"]["packed_bytes"] = [before, after]
        report["notes"].append(
            f"zeros take as many bytes as other numbers; packed for transport (compress --weights keep --package, "
            f"lossless) it is {size(after)}, the original {size(before)} ({ratio(after, before)})"
        )
    report["notes"].append(_speed(report["latency_ratio"]))
    if sparsity == "2:4":
        report["notes"].append(
            "sparse tensor cores (NVIDIA, Ampere and later) skip the zeros of 2:4: build with trtexec "
            "--sparsity=enable; that was not measured here"
        )


def _speed(measured: Mapping[str, float] | None) -> str:
    """What the zeros do for speed here: nothing."""
    told = "ONNX Runtime on a CPU multiplies by zeros as by other numbers"
    if measured is None:
        return f"{told}; nothing was timed"
    found = f"{measured['median']:.3f}x of the original's time, 90 %: {measured['low']:.3f} to {measured['high']:.3f}"
    if measured["median"] < 0.97 and measured["high"] < 1:
        return f"{told}: what was gained here ({found}) is the exact passes'"
    return f"{told}: no speed was gained here ({found})"


def _packed(model: ir.Model) -> int:
    """Bytes of the model as a package.

    Raises:
        InputError: zstandard is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        files = save(model, Path(folder) / "model.onnx")
        return int(pack(files, Path(folder) / "model.pack")["packed_bytes"])
