"""Does the converted model compute what the framework computed? On the inputs that the framework was run on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import RuntimeFailure
from graphopt.session import Session
from graphopt.validation import Comparison, OutputDifference, output_noise, unstable

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

RELATIVE = 1e-4
"""Of an output's largest value: what two implementations of the same float32 arithmetic may differ by."""
MOST = 1e-2
"""The same, where the model's own noise is larger: more is never taken for agreement unasked."""
EPSILONS = 8
"""The same for shorter floats, in their own units in the last place."""

Sample = tuple[dict[str, "NDArray[Any]"], dict[str, "NDArray[Any]"]]


def stored(path: Path, count: int) -> list[Sample]:
    """The (inputs, outputs) that a worker saved.

    Raises:
        RuntimeFailure: the file is no such thing.
    """
    samples: list[Sample] = [({}, {}) for _ in range(count)]
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                index, side, name = key.split("/", 2)
                array = archive[key]
                samples[int(index)][side == "out"][name] = array.astype(object) if array.dtype.kind == "U" else array
    except Exception as error:  # whatever numpy and zipfile raise
        raise RuntimeFailure(f"the converter's samples cannot be read: {error}; run again with -v") from error
    if not samples:
        raise RuntimeFailure("the converter gave no samples to compare on; run again with -v")
    return samples


def agree(
    model: ir.Model, samples: list[Sample], *, max_abs: float | None = None, threads: int | None = None
) -> tuple[Comparison, dict[str, float], dict[str, list[tuple[int, ...]]]]:
    """The comparison, what each output may differ by, and the shapes it came in. It may differ by ``max_abs``, else
    by the larger of the model's own noise (to :data:`MOST` of its largest value) and :data:`RELATIVE`; integers,
    booleans and strings must be equal.

    Raises:
        RuntimeFailure: the converted model does not load or run.
    """
    session = Session(model, threads=threads)
    differences = {name: OutputDifference(name) for name in session.output_names}
    notes: list[str] = []
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in differences}
    for feeds, expected in samples:
        found = session.run(feeds)
        for name, difference in differences.items():
            difference.add(_as(expected[name], found[name]), found[name])
            if isinstance(found[name], np.ndarray):
                seen[name].append(found[name].shape)
    for name in unstable(session, samples[0][0]) if max_abs is None else ():
        differences[name].mismatch = "the converted model gives other values each time (random operators?)"
    noise = output_noise(model, [feeds for feeds, _ in samples[:1]], threads=threads)
    allowed = {}
    for name, difference in differences.items():
        own = noise.get(name, 0.0)
        kind = np.asarray(found[name]).dtype
        relative = max(RELATIVE, EPSILONS * float(np.finfo(kind).eps)) if kind.kind == "f" else 0.0
        least = max(min(own, MOST * difference.scale), relative * difference.scale)
        allowed[name] = least if max_abs is None else max_abs
    if all(_says_nothing(expected) for _, expected in samples):
        notes.append("WARNING: every output is NaN, infinite or the same everywhere, so agreement proves little")
    return Comparison(list(differences.values()), len(samples), notes), allowed, seen


def _as(expected: NDArray[Any], found: Any) -> NDArray[Any]:
    """The framework's output in the converted model's type: frameworks that compute in double hand out floats."""
    kind = np.asarray(found).dtype
    if expected.dtype != kind and expected.dtype.kind == kind.kind and kind.kind in "fiu":
        return expected.astype(kind)
    return expected


def _says_nothing(outputs: dict[str, NDArray[Any]]) -> bool:
    return all(
        array.dtype.kind == "f" and (not np.isfinite(array).all() or (array.size > 1 and np.ptp(array) == 0))
        for array in outputs.values()
    )


def parted(comparison: Comparison, allowed: dict[str, float]) -> str | None:
    """Why the model is refused, or None: the worst output against what it may differ by."""
    for output in comparison.outputs:
        if output.mismatch is not None:
            return f"output '{output.name}': {output.mismatch}"
    bad = [o for o in comparison.outputs if not o.max_abs <= allowed[o.name]]
    if not bad:
        return None
    worst = max(bad, key=lambda o: o.max_abs / max(allowed[o.name], 1e-30))
    return f"output '{worst.name}': max abs diff {worst.max_abs:.3g}, allowed is {allowed[worst.name]:.3g}"
