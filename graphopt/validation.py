"""Is B still doing A's job? Numbers per output, exactness within the model's own noise, non-determinism.

Metrics, gates and intervals are in ``gates.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.bounds import input_bounds, is_mask
from graphopt.data import legal_random
from graphopt.errors import GraphoptError, InputError, RuntimeFailure
from graphopt.model import ValueSpec, interface
from graphopt.session import Runs, Session

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Feeds = Mapping[str, NDArray[Any]]

NOISE_FACTOR = 4.0
BLOCK = 1 << 20
"""Elements compared at once: comparing makes float64 copies, and outputs may be large."""
NOISE_FLOOR = 1e-6
"""Of an output's largest value: what no float32 model is expected to keep."""
OTHER_SIZES = (None, 64, 512)
"""What symbolic dims are set to, in turn, until the model runs: a window of audio is longer than the usual 8."""
MAX_ELEMENTS = 2**20
"""Of an input whose symbolic dims are set to one of those: four of 512 would take 256 GB."""
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
        """One sample's values of this output; the parts of a sequence or map count as one output together."""
        if isinstance(a, (list, dict)) or isinstance(b, (list, dict)) or a is None or b is None:
            if type(a) is not type(b) or _keys(a) != _keys(b):
                self.mismatch = self.mismatch or "a sequence, map or optional output has other parts"
                return
            for key in _keys(a):
                self.add(a[key], b[key])
            return
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype != b.dtype or a.shape != b.shape:
            self.mismatch = self.mismatch or f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
            return
        if a.size == 0:
            return
        if a.dtype.kind not in "fiub":
            if not np.array_equal(a, b):
                self.mismatch = self.mismatch or "values of a non-numeric output differ"
            return
        self._count_rows(a, b)
        flat, other = a.reshape(-1), b.reshape(-1)
        for start in range(0, a.size, BLOCK):
            self._numbers(flat[start : start + BLOCK], other[start : start + BLOCK])

    def _numbers(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        difference = _distance(a, b)
        a, b = a.astype(np.float64), b.astype(np.float64)
        odd = ~np.isfinite(a) | ~np.isfinite(b)
        if odd.any():
            if not np.array_equal(a[odd], b[odd], equal_nan=True):
                self.mismatch = self.mismatch or "NaN or Inf in other places"
            a, b, difference = a[~odd], b[~odd], difference[~odd]
            if a.size == 0:
                return
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.scale = max(self.scale, float(np.abs(a).max()))
        nonzero = a != 0
        if nonzero.any():
            with np.errstate(over="ignore"):  # a denormal may be infinitely wrong
                self.max_rel = max(self.max_rel, float((difference[nonzero] / np.abs(a[nonzero])).max()))
        self._signal += float(np.vdot(a, a))
        self._other += float(np.vdot(b, b))
        self._noise += float(np.vdot(difference, difference))
        self._dot += float(np.vdot(a, b))

    def _count_rows(self, a: NDArray[Any], b: NDArray[Any]) -> None:
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


def _keys(value: Any) -> list[Any]:
    """The places of a sequence or map; none of what is absent."""
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def _distance(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """|a - b|; 64-bit integers are subtracted as such, since float64 cannot tell neighbours above 2^53 apart."""
    if a.dtype.kind in "iu" and a.dtype.itemsize == 8:
        wrapped = a.astype(np.uint64), b.astype(np.uint64)
        return np.where(a > b, wrapped[0] - wrapped[1], wrapped[1] - wrapped[0]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # Inf - Inf: told apart by the caller
        return np.abs(a.astype(np.float64) - b.astype(np.float64))


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
    keep: Callable[[Feeds, Mapping[str, Any], Mapping[str, Any]], None] | None = None,
) -> Comparison:
    """Run both on the same feeds; outputs are matched by name, and A is run twice on the first to see if it can be.

    ``keep`` is given each feed with A's and B's outputs, for whoever needs them too.

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
        if count == 0:  # before B runs: no more than two models' outputs are held at once
            for name in moved(before, a.run(feed, names)):
                differences[name].nondeterministic = True
        after = b.run(feed, [n for n in names if n not in missing])
        for name, value in after.items():
            differences[name].add(before[name], value)
        if keep is not None:
            keep(feed, before, after)
        count += 1
        del before, after  # not held while the next ones are computed
    notes = [
        f"output '{d.name}' is non-deterministic in the original: excluded"
        for d in differences.values()
        if d.nondeterministic
    ]
    return Comparison(list(differences.values()), count, notes)


def unstable(session: Session, feed: Feeds, names: Sequence[str] | None = None) -> set[str]:
    """The outputs that differ between two runs on the same feed."""
    return moved(session.run(feed, names), session.run(feed, names))


def moved(first: Mapping[str, Any], second: Mapping[str, Any]) -> set[str]:
    """The outputs that differ between two runs."""
    found: set[str] = set()
    for name, value in first.items():
        probe = OutputDifference(name)
        probe.add(value, second[name])
        if probe.max_abs > 0 or probe.mismatch is not None:
            found.add(name)
    return found


def output_noise(model: ir.Model, feeds: Sequence[Feeds], *, threads: int | None = None) -> dict[str, float]:
    """How far the model's own outputs move for no good reason, per output, as max abs difference times four.

    The larger of: optimizations on against off, and float inputs moved by one unit in the last place; for float
    outputs at least a millionth (or one unit in the last place) of their largest value. Infinite where NaN, Inf or the
    shape change by that alone.

    Raises:
        RuntimeFailure: the model does not run.
    """
    plain, optimized = Session(model, optimize=False, threads=threads), Session(model, threads=threads)
    each = noise_by_feed(plain, optimized, feeds)
    return {name: max(noise[name] for noise in each) for name in each[0]} if each else {}


def noise_by_feed(
    plain: Runs,
    optimized: Runs,
    feeds: Sequence[Feeds],
    *,
    still: Callable[[Feeds], Mapping[str, NDArray[np.bool_]]] | None = None,
) -> list[dict[str, float]]:
    """:func:`output_noise` of each feed by itself, of a model loaded without and with the runtime's optimizations;
    ``still`` says which elements are not to be moved."""
    found: list[dict[str, float]] = []
    for feed in feeds:
        expected = plain.run(feed)
        floats = {k: v for k, v in feed.items() if v.dtype.kind == "f"}
        shifted = dict(feed)
        # As arrays: numpy makes a number of what has no axis, and the runtime takes none in half precision.
        shifted |= {k: np.asarray(np.nextafter(v, np.asarray(np.inf, v.dtype))) for k, v in floats.items()}
        shifted |= {k: np.where(where, feed[k], shifted[k]) for k, where in (still(feed) if still else {}).items()}
        noise = dict.fromkeys(expected, 0.0)
        for other in (optimized.run(feed), plain.run(shifted)):
            for name, value in other.items():
                probe = OutputDifference(name)
                probe.add(expected[name], value)
                own = math.inf if probe.mismatch is not None else probe.max_abs
                noise[name] = max(noise[name], own, _floor(expected[name]) * probe.scale)
        found.append({name: NOISE_FACTOR * value for name, value in noise.items()})
    return found


def _floor(value: Any) -> float:
    if not isinstance(value, np.ndarray):
        return NOISE_FLOOR
    return max(NOISE_FLOOR, float(np.finfo(value.dtype).eps)) if value.dtype.kind == "f" else 0.0


def exact_violation(comparison: Comparison, noise: Mapping[str, float]) -> str | None:
    """Why B is not an exact rewrite of A, or None.

    Integers and booleans have no noise, unless the model itself cannot tell (an arg max of ties, say); nothing can be
    said of an output whose noise is infinite.
    """
    for output in comparison.outputs:
        if output.nondeterministic:
            continue
        allowed = noise.get(output.name, 0.0)
        if output.mismatch is not None and not math.isinf(allowed):
            return f"output '{output.name}': {output.mismatch}"
        if output.max_abs > allowed:
            return f"output '{output.name}': max abs diff {output.max_abs:.3g}, the model's own noise is {allowed:.3g}"
    return None


def random_feeds(
    model: ir.Model, count: int = 2, *, seed: int = 0, batch: int | None = None, size: int | None = None
) -> list[dict[str, NDArray[Any]]]:
    """Legal random feeds: ids stay within the table that gathers from them, masks are 0 or 1. ``batch`` sets a symbolic
    leading dim, wherever its name stands, and ``size`` the other symbolic dims.

    Raises:
        InputError: an input that cannot be drawn, or that ``size`` would make larger than :data:`MAX_ELEMENTS`.
    """
    inputs, _ = interface(model)
    bounds = input_bounds(model, inputs)
    named = {i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], str)}

    def sized(axis: int, dim: int | str | None) -> int | str | None:
        if isinstance(dim, int):
            return dim
        return (batch if dim in named or axis == 0 else size) or dim

    inputs = tuple(
        ValueSpec(i.name, i.dtype, tuple(sized(*item) for item in enumerate(i.shape)) if i.shape else i.shape)
        for i in inputs
    )
    for spec in inputs if size is not None else ():
        elements = math.prod(dim for dim in spec.shape or () if isinstance(dim, int))
        if elements > MAX_ELEMENTS:
            raise InputError(f"input '{spec.name}' would have {elements} elements with dims of {size}; give real data")
    masks = {i.name for i in inputs if is_mask(i) and i.dtype is not None and i.dtype.kind == "f"}
    dataset = legal_random(inputs, seed=seed, n=count, bounds=bounds)
    return [{k: np.rint(v) if k in masks else v for k, v in sample.items()} for sample in dataset]


def runnable_feeds(
    model: ir.Model, session: Session, count: int = 2, *, seed: int = 0, batch: int | None = None
) -> list[dict[str, NDArray[Any]]]:
    """Those of :func:`random_feeds` on which ``session`` (``model``, loaded) runs, at the first of
    :data:`OTHER_SIZES` at which it runs at all: what an operator takes is no matter of type and rank alone.

    Raises:
        RuntimeFailure: there is none; the message is the first that the runtime gave.
        InputError: an input that cannot be drawn.
    """
    failure: GraphoptError | None = None
    for size in OTHER_SIZES:
        found = []
        try:
            for feed in random_feeds(model, count, seed=seed, batch=batch, size=size):
                try:
                    session.run(feed)
                    found.append(feed)
                except RuntimeFailure as error:
                    failure = failure or error
        except InputError as error:
            raise failure or error from None
        if found:
            return found
    assert failure is not None
    raise failure


def runnable(model: ir.Model) -> str | None:
    """Why ONNX Runtime cannot load the model (custom operators, say), or None when it can."""
    try:
        Session(model, threads=1)
    except RuntimeFailure as error:
        return str(error)
    return None
