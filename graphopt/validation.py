"""Is B still doing A's job? Numbers per output, exactness within the model's own noise, non-determinism.

Metrics, gates and intervals are in ``gates.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.data import legal_random
from graphopt.errors import RuntimeFailure
from graphopt.graph import constant, is_op, nodes
from graphopt.model import ValueSpec, interface
from graphopt.session import Session

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Feeds = Mapping[str, NDArray[Any]]

NOISE_FACTOR = 4.0
RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclass
class OutputDifference:
    """How one output of B differs from A's, over all samples.

    ``sqnr`` is 10 log10(sum A^2 / sum (A - B)^2) in dB; ``agreement`` the share of rows (last axis) with the same
    arg max; ``mismatch`` says what cannot be expressed as a difference (dtype, shape, NaN positions).
    """

    name: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    scale: float = 0.0  # largest |A|
    agreement: float | None = None
    mismatch: str | None = None
    nondeterministic: bool = False
    _signal: float = 0.0
    _noise: float = 0.0
    _dot: float = 0.0
    _other: float = 0.0
    _rows: int = 0
    _agree: int = 0

    @property
    def sqnr(self) -> float:
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal > 0 else -math.inf

    @property
    def cosine(self) -> float:
        norm = math.sqrt(self._signal * self._other)
        return self._dot / norm if norm else 1.0 if self._noise == 0 else 0.0

    def add(self, a: Any, b: Any) -> None:
        """One sample's values of this output."""
        if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
            if not _same_structure(a, b):
                self.mismatch = self.mismatch or "a sequence, map or optional output differs"
            return
        if a.dtype != b.dtype or a.shape != b.shape:
            self.mismatch = self.mismatch or f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
            return
        if a.size == 0:
            return
        if a.dtype.kind not in "fiub":
            if not np.array_equal(a, b):
                self.mismatch = self.mismatch or "values of a non-numeric output differ"
            return
        self._numbers(a.astype(np.float64), b.astype(np.float64))

    def _numbers(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        self._count_rows(a, b)
        odd = ~np.isfinite(a) | ~np.isfinite(b)
        if odd.any():
            if not np.array_equal(a[odd], b[odd], equal_nan=True):
                self.mismatch = self.mismatch or "NaN or Inf in other places"
            a, b = a[~odd], b[~odd]
            if a.size == 0:
                return
        difference = np.abs(a - b)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.scale = max(self.scale, float(np.abs(a).max()))
        nonzero = a != 0
        if nonzero.any():
            self.max_rel = max(self.max_rel, float((difference[nonzero] / np.abs(a[nonzero])).max()))
        self._signal += float(np.vdot(a, a))
        self._other += float(np.vdot(b, b))
        self._noise += float(np.vdot(difference, difference))
        self._dot += float(np.vdot(a, b))

    def _count_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        if a.ndim < 2 or a.shape[-1] < 2:
            return
        same = a.argmax(-1) == b.argmax(-1)
        self._rows += same.size
        self._agree += int(same.sum())
        self.agreement = self._agree / self._rows

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.name,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "sqnr_db": self.sqnr if math.isfinite(self.sqnr) else None,
            "identical": self._noise == 0 and self.mismatch is None,
            "cosine": self.cosine,
            "top1_agreement": self.agreement,
            "mismatch": self.mismatch,
            "nondeterministic": self.nondeterministic,
        }


def _same_structure(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same_structure(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_structure(v, b[k]) for k, v in a.items())
    if isinstance(a, (np.ndarray, float)) and isinstance(b, (np.ndarray, float)):
        return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True))
    return bool(a == b)


@dataclass
class Comparison:
    """A against B over ``samples`` samples."""

    outputs: list[OutputDifference]
    samples: int
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> OutputDifference | None:
        """The output with the lowest SQNR among the deterministic ones."""
        judged = [o for o in self.outputs if not o.nondeterministic]
        return min(judged, key=lambda o: (o.mismatch is None, o.sqnr), default=None)

    @property
    def sqnr(self) -> float:
        worst = self.worst
        return math.inf if worst is None else -math.inf if worst.mismatch else worst.sqnr

    def as_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "outputs": [o.as_dict() for o in self.outputs], "notes": self.notes}


def compare_sessions(
    a: Session,
    b: Session,
    feeds: Iterable[Feeds],
    *,
    limit: int | None = None,
    output_names: Sequence[str] | None = None,
) -> Comparison:
    """Run both on the same feeds; outputs are matched by name, and A is run twice on the first to see if it can be.

    Raises:
        RuntimeFailure: one of them does not run.
    """
    names = list(output_names or a.output_names)
    differences = {name: OutputDifference(name) for name in names}
    missing = [n for n in names if n not in b.output_names]
    for name in missing:
        differences[name].mismatch = "the output is gone"
    count = 0
    for feed in islice(feeds, limit):
        before = a.run(feed, names)
        after = b.run(feed, [n for n in names if n not in missing])
        if count == 0:
            again = a.run(feed, names)
            for name in names:
                probe = OutputDifference(name)
                probe.add(before[name], again[name])
                differences[name].nondeterministic = probe._noise > 0 or probe.mismatch is not None
        for name, value in after.items():
            differences[name].add(before[name], value)
        count += 1
    notes = [
        f"output '{d.name}' is non-deterministic in the original: excluded"
        for d in differences.values()
        if d.nondeterministic
    ]
    return Comparison(list(differences.values()), count, notes)


def output_noise(model: ir.Model, feeds: Sequence[Feeds], *, threads: int | None = None) -> dict[str, float]:
    """How far the model's own outputs move for no good reason, per output, as max abs difference times four.

    The larger of: optimizations on against off, and float inputs moved by one unit in the last place.

    Raises:
        RuntimeFailure: the model does not run.
    """
    plain = Session(model, optimize=False, threads=threads)
    optimized = Session(model, threads=threads)
    noise: dict[str, float] = dict.fromkeys(plain.output_names, 0.0)
    for feed in feeds:
        reference = plain.run(feed)
        moved = {
            k: np.nextafter(v, np.asarray(np.inf, v.dtype)) if v.dtype.kind == "f" and v.dtype.itemsize > 1 else v
            for k, v in feed.items()
        }
        for other in (optimized.run(feed), plain.run(moved)):
            for name, value in other.items():
                probe = OutputDifference(name)
                probe.add(reference[name], value)
                noise[name] = max(noise[name], probe.max_abs, 1e-6 * probe.scale)
    return {name: NOISE_FACTOR * value for name, value in noise.items()}


def exact_violation(comparison: Comparison, noise: Mapping[str, float], dtypes: Mapping[str, bool]) -> str | None:
    """Why B is not an exact rewrite of A, or None. ``dtypes``: output name -> whether it is floating point."""
    for output in comparison.outputs:
        if output.nondeterministic:
            continue
        if output.mismatch is not None:
            return f"output '{output.name}': {output.mismatch}"
        allowed = noise.get(output.name, 0.0) if dtypes.get(output.name, True) else 0.0
        if output.max_abs > allowed:
            return f"output '{output.name}': max abs diff {output.max_abs:.3g}, the model's own noise is {allowed:.3g}"
    return None


def random_feeds(
    model: ir.Model, count: int = 2, *, seed: int = 0, batch: int | None = None
) -> list[dict[str, NDArray[Any]]]:
    """Legal random feeds: ids stay within the table that gathers from them, masks are 0 or 1.

    ``batch`` sets a symbolic leading dim, to try a second shape.
    """
    inputs, _ = interface(model)
    bounds = _input_bounds(model, inputs)
    if batch is not None:
        inputs = tuple(
            ValueSpec(
                i.name, i.dtype, (batch, *i.shape[1:]) if i.shape and not isinstance(i.shape[0], int) else i.shape
            )
            for i in inputs
        )
    dataset = legal_random(inputs, seed=seed, n=count, bounds=bounds)
    return [dict(sample) for sample in dataset]


def _input_bounds(model: ir.Model, inputs: Sequence[ValueSpec]) -> dict[str, tuple[float, float]]:
    """Integer inputs that index a constant table get its size as their bound."""
    bounds: dict[str, tuple[float, float]] = {}
    for value in model.graph.inputs:
        if value.name and "mask" in value.name.lower():
            bounds[value.name] = (0, 1)
    wanted = {spec.name for spec in inputs if spec.dtype is not None and spec.dtype.kind in "iu"}
    for node in nodes(model):
        if not is_op(node, "Gather", "GatherElements") or len(node.inputs) < 2:
            continue
        table, index = constant(node.inputs[0]), node.inputs[1]
        while (
            index is not None
            and index.producer() is not None
            and is_op(index.producer(), "Cast", "Reshape", "Unsqueeze")
        ):
            producer = index.producer()
            assert producer is not None
            index = producer.inputs[0]
        if table is None or index is None or index.name not in wanted:
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        size = int(table.shape.numpy()[axis])
        low, high = bounds.get(index.name, (0, size - 1))
        bounds[index.name] = (low, min(high, size - 1))
    return bounds


def runnable(model: ir.Model) -> str | None:
    """Why ONNX Runtime cannot load the model (custom operators, say), or None when it can."""
    try:
        Session(model, threads=1)
    except RuntimeFailure as error:
        return str(error)
    return None
