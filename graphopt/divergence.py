"""Layers and what to make of them: which value is the first that differs, where most is lost, what was tolerated.

``layerwise.py`` fills them in.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import InputError
from graphopt.gates import GateResult
from graphopt.validation import Comparison, OutputDifference

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 15
"""Elements compared at once: the float64 copies that comparing makes stay in the processor's cache, and small."""

ROUNDING = {2: 45.0, 4: 90.0, 8: 90.0}
"""SQNR in dB by bytes per float: what is above differs by rounding, not by what is computed."""
_NOISE_MARGIN = 12.0  # dB, a factor of four, as in validation.NOISE_FACTOR
_ENOUGH = 60.0  # dB: a fall that ends above is not worth pointing at where another ends below
_NOTHING, _MUCH = 10.0, 30.0  # dB: values with nothing in common, and such as no layer makes of those
SWALLOWING = frozenset(
    {"Softmax", "Sigmoid", "HardSigmoid", "Tanh", "ArgMax", "ArgMin", "Sign", "Round", "Floor", "Ceil", "Not", "And"}
    | {"Or", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
)
"""Operators whose result may agree though what they read does not: a sure classifier's Softmax is 1 anyway."""
_JUMP = 20.0  # dB: what agrees must be that much closer than what is taken for another value
_CEILING = 150.0  # dB: "identical", when falls are measured


class Distance(OutputDifference):
    """An ``OutputDifference`` that counts no rows and relates no element to its own size: thousands of values pass."""

    def _numbers(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = x - y
            signal, other, noise = _product(x, x), _product(y, y), _product(difference, difference)
        if a.dtype.kind != "f" or not math.isfinite(signal + other + noise):
            super()._numbers(a, b)  # NaN, Inf, and integers that float64 cannot tell apart
            return
        self.max_abs = max(self.max_abs, float(difference.max()), -float(difference.min()))
        self.scale = max(self.scale, float(x.max()), -float(x.min()))
        self._signal += signal
        self._other += other
        self._noise += noise
        self._dot += _product(x, y)


def _product(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Not np.dot: BLAS wakes threads for every block, and where ONNX Runtime has the cores, waits for them."""
    return float(np.einsum("i,i->", x, y))


@dataclass(frozen=True)
class Match:
    """A value of A and the one of B; ``after`` is what B's nodes read where B quantizes it.

    ``sources`` are the nearest matched values of A behind it; ``swallowed``: every way from them leads through one of
    :data:`SWALLOWING`.
    """

    a: str
    b: str
    after: str | None
    node: str
    op_type: str
    sources: frozenset[str]
    swallowed: bool = False


@dataclass
class Odd:
    """NaN and Inf of a value over all samples."""

    nan: int = 0
    inf: int = 0
    first: tuple[int, list[int]] | None = None  # (sample, index)

    def add(self, array: Any, sample: int) -> None:
        """Count one sample's, block by block."""
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            return
        flat = array.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            finite = np.isfinite(flat[start : start + BLOCK])
            if finite.all():
                continue
            nan = int(np.isnan(flat[start : start + BLOCK]).sum())
            self.nan += nan
            self.inf += int((~finite).sum()) - nan
            if self.first is None:
                where = np.unravel_index(start + int(np.argmin(finite)), array.shape)
                self.first = (sample, [int(i) for i in where])

    def as_dict(self) -> dict[str, Any] | None:
        """None where there are none."""
        if self.first is None:
            return None
        return {"nan": self.nan, "inf": self.inf, "sample": self.first[0], "index": self.first[1]}


@dataclass
class Layer:
    """How one value differs, over all samples."""

    match: Match
    direct: Distance
    after: Distance | None
    noise: Distance  # A against A with its inputs moved by one unit in the last place
    odd_a: Odd = field(default_factory=Odd)
    odd_b: Odd = field(default_factory=Odd)
    nondeterministic: bool = False
    elsewhere: bool = False  # what it was matched with is another value
    kind: str = ""
    itemsize: int = 0
    inputs: float = math.inf  # the lowest effective SQNR among what its node reads

    @property
    def effective(self) -> float:
        """SQNR of what the next nodes read."""
        return _decibel(self.after or self.direct)

    @property
    def lowest(self) -> float:
        """The lower of the value itself and the value after it was quantized."""
        return min(_decibel(self.direct), self.effective)

    @property
    def largest(self) -> float:
        return max(d.max_abs for d in (self.direct, self.after) if d is not None)

    @property
    def mismatch(self) -> str | None:
        return self.direct.mismatch or (self.after.mismatch if self.after is not None else None)

    @property
    def judged(self) -> bool:
        return not self.nondeterministic and not self.elsewhere

    @property
    def differs(self) -> bool:
        """By more than rounding."""
        if not self.judged:
            return False
        if self.mismatch is not None:
            return self.noise.mismatch is None
        if self.kind != "f":
            return self.largest > 4 * self.noise.max_abs
        if self.direct.scale == 0 and self.largest <= 1e-6:
            return False  # zeros in A: there is nothing to relate a tiny difference to
        return self.lowest < min(ROUNDING.get(self.itemsize, 90.0), self.noise.sqnr - _NOISE_MARGIN)

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.match.a,
            "in_b": self.match.b,
            "node": self.match.node,
            "op_type": self.match.op_type,
            **_numbers(self.direct),
            "quantized": None if self.after is None else {"in_b": self.match.after, **_numbers(self.after)},
            "lowest_sqnr_db": _finite(self.lowest),
            "inputs_sqnr_db": _finite(self.inputs),
            "scale": self.direct.scale,
            "odd_a": self.odd_a.as_dict(),
            "odd_b": self.odd_b.as_dict(),
            "mismatch": self.mismatch,
            "nondeterministic": self.nondeterministic,
            "other_value": self.elsewhere,
            "differs": self.differs,
        }


def _numbers(difference: OutputDifference) -> dict[str, Any]:
    return {
        key: value
        for key, value in difference.as_dict().items()
        if key in ("sqnr_db", "max_abs", "cosine", "identical")
    }


def _decibel(difference: OutputDifference) -> float:
    return -math.inf if difference.mismatch is not None else difference.sqnr


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Tolerances


@dataclass(frozen=True)
class Tolerances:
    """What was asked for; ``by_name`` holds limits of single values, which stand in for ``max_abs`` there."""

    min_sqnr: float | None = None
    max_abs: float | None = None
    by_name: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.min_sqnr is not None or self.max_abs is not None or bool(self.by_name)

    def __str__(self) -> str:
        asked = [] if self.min_sqnr is None else [f"min-sqnr {self.min_sqnr:g}"]
        asked += [] if self.max_abs is None else [f"max-abs {self.max_abs:g}"]
        return ", ".join([*asked, *(f"max-abs {name}:{value:g}" for name, value in self.by_name.items())])

    def limit(self, name: str) -> float | None:
        """The largest difference this value may have."""
        return self.by_name.get(name, self.max_abs)

    def check(self, names: Iterable[str]) -> None:
        """Every name is one of ``names``.

        Raises:
            InputError: with the nearest name there is.
        """
        known = list(names)
        for name in self.by_name:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"it can be given for {', '.join(known[:6])}"
                raise InputError(f"--max-abs names '{name}', and no compared value is called that; {hint}")

    def past(self, layer: Layer) -> str | None:
        """How ``layer`` is out of tolerance, or None."""
        limit = self.limit(layer.match.a)
        if not layer.judged or (self.min_sqnr is None and limit is None):
            return None
        if layer.mismatch is not None:
            return layer.mismatch
        if self.min_sqnr is not None and layer.lowest < self.min_sqnr:
            return f"SQNR {layer.lowest:.1f} dB"
        if limit is not None and layer.largest > limit:
            return f"max abs diff {layer.largest:.3g}"
        return None


def tolerances(min_sqnr: float | None, max_abs: Any) -> Tolerances:
    """``max_abs``: a number, ``"1e-3"``, ``"out0:1e-3"``, a list of these, or a mapping from name to number.

    Raises:
        InputError: one of them is no tolerance.
    """
    if isinstance(max_abs, Mapping):
        given = [f"{name}:{value}" for name, value in max_abs.items()]
    elif isinstance(max_abs, (list, tuple)):
        given = [str(item) for item in max_abs]
    else:
        given = [] if max_abs is None else [str(max_abs)]
    default: float | None = None
    by_name: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition(":")  # names may hold colons
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not value >= 0:
            raise InputError(f"--max-abs '{text}' is no tolerance; write 1e-3 for all, or out0:1e-3 for one output")
        if name:
            by_name[name] = value
        else:
            default = value
    return Tolerances(min_sqnr, default, by_name)


def max_abs_gates(comparison: Comparison, asked: Tolerances) -> list[GateResult]:
    """One gate for all outputs without a limit of their own, and one for each that has; another type or shape fails."""
    found: list[GateResult] = []
    judged = [o for o in comparison.outputs if not o.nondeterministic]
    groups = [] if asked.max_abs is None else [(f"{asked.max_abs:g}", asked.max_abs, judged)]
    groups = [(text, limit, [o for o in group if o.name not in asked.by_name]) for text, limit, group in groups]
    for name, limit in asked.by_name.items():
        own = [o for o in judged if o.name == name]
        groups += [(f"{name}:{limit:g}", limit, own)] if own else []
    for text, limit, group in groups:
        wrong = next((o for o in group if o.mismatch is not None), None)
        largest = max((o.max_abs for o in group), default=0.0)
        measured = f"{largest:.3g}" if wrong is None else f"output '{wrong.name}': {wrong.mismatch}"
        found.append(GateResult("max-abs", text, measured, wrong is None and largest <= limit))
    return found


def layer_gates(layers: Sequence[Layer], asked: Tolerances) -> list[GateResult]:
    """Every value within tolerance; nothing where none was asked for."""
    if not asked:
        return []
    past = first_past(layers, asked)
    if past is None:
        return [GateResult("layerwise", str(asked), f"all {len(layers)} values are within it", True)]
    made = f"{past[0].match.op_type} '{past[0].match.node}'" if past[0].match.op_type else "an input"
    return [GateResult("layerwise", str(asked), f"first past it is '{past[0].match.a}' ({made}), {past[1]}", False)]


# Findings


def trace(layers: Mapping[str, Layer]) -> None:
    """Enter what each node was given, and which values were matched with another one.

    A value that differs while all it leads to agrees is another value that got its name (or its place) when nodes were
    fused: what is computed from a wrong value is wrong. What may swallow a difference does not count as agreeing,
    unless the two values have nothing in common.
    """
    readers: dict[str, set[str]] = {name: set() for name in layers}  # past those that are another value themselves
    for name, layer in reversed(list(layers.items())):
        after = [layers[one] for one in readers[name] if not layers[one].nondeterministic]
        if layer.differs and after:
            told = layer.lowest < _NOTHING or any(not one.match.swallowed for one in after)
            agree = told and all(not one.differs and one.effective >= layer.lowest + _JUMP for one in after)
            recovered = layer.lowest < _NOTHING and all(one.effective >= _MUCH for one in after)
            layer.elsewhere = agree or recovered
        for source in layer.match.sources:
            readers[source] |= readers[name] if layer.elsewhere else {name}
    for layer in layers.values():
        behind = [layers[name] for name in layer.match.sources]
        read = [one.effective if one.judged else one.inputs for one in behind]
        layer.inputs = min(read, default=math.inf)


def first_past(layers: Sequence[Layer], asked: Tolerances) -> tuple[Layer, str] | None:
    """The first value in order of execution past a tolerance; without tolerances, past what rounding explains."""
    for layer in layers:
        why = asked.past(layer) if asked else _why(layer) if layer.differs else None
        if why is not None:
            return layer, why
    return None


def _why(layer: Layer) -> str:
    if layer.mismatch is not None:
        return layer.mismatch
    return f"SQNR {layer.lowest:.1f} dB" if math.isfinite(layer.lowest) else f"max abs diff {layer.largest:.3g}"


def steepest(layers: Sequence[Layer]) -> Layer | None:
    """The node at which most is lost between what it reads and what the next ones read."""
    judged = [layer for layer in layers if layer.differs and layer.match.op_type]
    top = _ENOUGH if any(layer.effective < _ENOUGH for layer in judged) else _CEILING

    def fall(layer: Layer) -> float:
        return min(max(layer.inputs, 0.0), top) - min(max(layer.effective, 0.0), top)

    worst = max(judged, key=fall, default=None)
    return worst if worst is not None and fall(worst) > 0 else None


def findings(layers: Sequence[Layer], unmatched: Sequence[str], asked: Tolerances) -> dict[str, Any]:
    """What is reported of the layers."""
    found, loss = first_past(layers, asked), steepest(layers)
    return {
        "values": [layer.as_dict() for layer in layers],
        "unmatched": list(unmatched),
        "nondeterministic": [layer.match.a for layer in layers if layer.nondeterministic],
        "tolerances": str(asked),
        "first": None if found is None else {**_where(found[0]), "why": found[1]},
        "steepest": None if loss is None else _where(loss),
    }


def _where(layer: Layer) -> dict[str, Any]:
    return {
        "value": layer.match.a,
        "node": layer.match.node,
        "op_type": layer.match.op_type,
        "sqnr_db": _finite(layer.effective),
        "inputs_sqnr_db": _finite(layer.inputs),
    }
