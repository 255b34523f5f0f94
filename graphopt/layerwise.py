"""Where do A and B part? Every value that both compute is compared, a few at a time, in order of execution.

Both models run in lockstep over the samples, with as many values tapped at once as the memory given allows; differences
are accumulated, values are dropped. ONNX Runtime's optimizations are off, so that taps change nothing of what is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.align import align
from graphopt.divergence import BLOCK, SWALLOWING, Distance, Layer, Match, Tolerances, findings, trace
from graphopt.errors import InputError, RuntimeFailure
from graphopt.extraction import by_onnx_ir, reads, typed
from graphopt.gates import parse_size
from graphopt.graph import EQUALIZED, constant, is_op, label, static_shape
from graphopt.model import clone
from graphopt.session import Session
from graphopt.taps import tap_chunks
from graphopt.validation import RANDOM_OPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feeds = Mapping[str, NDArray[Any]]
    Progress = Callable[[int, int | None, str], None]
    Ask = Callable[[], Iterable[Feeds]]

MEMORY = 1 << 30
"""Bytes: what the values of one round may take together, unless said otherwise."""

_MEASURED = 16  # values of unknown shape measured at once
_HUGE = 1e30
_HUGE_HALF = 6e4
_UNREADABLE = frozenset({"BFLOAT16", "INT4", "UINT4", "INT2", "UINT2"})  # and every FLOAT below 16 bits


def layerwise(
    a: ir.Model,
    b: ir.Model,
    feeds: Ask,
    asked: Tolerances,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Layer]]:
    """What to report of the two models layer by layer, and the layers.

    ``memory`` (``"512MB"``, default :data:`MEMORY`) caps what the tapped values take at once.

    Raises:
        InputError: ``memory`` is no size, or a tolerance is for a value that is not compared.
        RuntimeFailure: a model does not load or run without optimizations.
    """
    cap = MEMORY if memory is None else _size(memory)
    matches, unmatched = match_values(a, b)
    asked.check([m.a for m in matches])
    layers = compare_layers(a, b, feeds, matches, memory=cap, threads=threads, progress=progress)
    return {"memory": cap, **findings(layers, unmatched, asked)}, layers


def _size(memory: str | int) -> int:
    size = parse_size(str(memory), 0)
    if size < 1 << 20:
        raise InputError(f"--memory '{memory}' is less than the 1 MB that it takes at least; write 512MB")
    return size


# Which value is which


def match_values(a: ir.Model, b: ir.Model) -> tuple[list[Match], list[str]]:
    """The values that both compute from their inputs, in A's order of execution, and those of A that B has not.

    By structure where graphopt can align the two, and by equal name for the rest: what graphopt makes keeps the names.
    """
    a = typed(a)
    pairs = _pairs(a, b)
    live = {v for v in a.graph.inputs if not v.is_initializer()}
    sources: dict[ir.Value, frozenset[str]] = {}
    swallowed: dict[ir.Value, bool] = {}
    matches: list[Match] = []
    unmatched: list[str] = []
    for value in [v for v in a.graph.inputs if v in live]:
        before, after = pairs.get(value.name or "", ("", None))
        if after is not None:  # an input is the same in both, unless B quantizes it
            matches.append(Match(value.name or "", before, after, "", "", frozenset()))
            sources[value] = frozenset({value.name or ""})
    for node in a.graph:
        read = list(reads(node))
        if not any(v in live for v in read) and node.op_type not in RANDOM_OPS:
            continue  # a constant: nothing to compare at run time
        behind = frozenset[str]().union(*(sources.get(v, frozenset()) for v in read))
        lost = node.op_type in SWALLOWING or all(swallowed.get(v, False) for v in read if v in live)
        for value in node.outputs:
            live.add(value)
            sources[value], swallowed[value] = behind, lost
            name = value.name or ""
            if name in pairs and _readable(value):
                matches.append(Match(name, *pairs[name], label(node), node.op_type, behind, lost))
                sources[value], swallowed[value] = frozenset({name}), False
            elif name and name not in pairs:
                unmatched.append(name)
    return matches, unmatched


def _pairs(a: ir.Model, b: ir.Model) -> dict[str, tuple[str, str | None]]:
    """A's values -> (B's, B's after quantization), in A's order.

    Where nodes were fused, several values of A stand for one of B, and only the last of them is that value. Outputs are
    matched by name: they are what both models promise.
    """
    theirs = {v.name: v for v in (*b.graph.inputs, *(v for node in b.graph for v in node.outputs)) if v.name}
    aligned = align(a, b)
    promised = {v.name for v in a.graph.outputs} & {v.name for v in b.graph.outputs}
    used = set(aligned.values.values()) - promised
    found: dict[str, tuple[str, str | None]] = {}
    last: dict[str, str] = {}
    for value in (*a.graph.inputs, *(v for node in a.graph for v in node.outputs)):
        name = value.name or ""
        other = name if name in promised else aligned.values.get(name) or (name if name not in used else "")
        if other in theirs and (EQUALIZED not in other or other == name):
            found[name] = _quantized(value, theirs[other])
            last[found[name][0]] = name
    return {n: pair for n, pair in found.items() if last[pair[0]] == n or aligned.how.get(n) == "same"}


def _quantized(mine: ir.Value, other: ir.Value) -> tuple[str, str | None]:
    """(B's own value, that value after QuantizeLinear and DequantizeLinear); B's pair may have taken over the name."""
    name, producer = other.name or "", other.producer()
    pair_in_a = is_op(mine.producer(), "DequantizeLinear") or any(is_op(n, "QuantizeLinear") for n, _ in mine.uses())
    if pair_in_a or constant(other) is not None:
        return name, None
    if is_op(producer, "DequantizeLinear"):
        assert producer is not None
        integer = producer.inputs[0]
        quantize = integer.producer() if integer is not None else None
        if is_op(quantize, "QuantizeLinear"):
            assert quantize is not None
            source = quantize.inputs[0]
            return (source.name or "", name) if source is not None else (name, None)
    for quantize, index in other.uses():
        if index == 0 and is_op(quantize, "QuantizeLinear"):
            for dequantize, position in quantize.outputs[0].uses():
                if position == 0 and is_op(dequantize, "DequantizeLinear"):
                    return name, dequantize.outputs[0].name
    return name, None


def _readable(value: ir.Value) -> bool:
    """Whether numpy has its type; what is unknown is tried."""
    name = value.dtype.name if value.dtype is not None else ""
    return name not in _UNREADABLE and not name.startswith(("FLOAT4", "FLOAT6", "FLOAT8"))


# Running both


def compare_layers(
    a: ir.Model,
    b: ir.Model,
    feeds: Ask,
    matches: Sequence[Match],
    *,
    memory: int = MEMORY,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Layer]:
    """Compare all ``matches`` over all samples; ``feeds()`` gives them anew for every round.

    A is run twice on the first sample to find what is non-deterministic, and once more with its inputs moved by one
    unit in the last place to find what is rounding.

    Raises:
        RuntimeFailure: one of them does not load or run; the message says which.
    """
    fed = {v.name for v in a.graph.inputs}
    first = next(iter(feeds()), None)
    if first is None:
        raise InputError("there are no samples to compare on; give --data with at least one")
    layers = {m.a: Layer(m, Distance(m.a), Distance(m.a) if m.after else None, Distance(m.a)) for m in matches}
    with _Of("A"):
        # A quarter: A's values twice (is it deterministic?), and B's with those after its DequantizeLinear.
        inner = [m.a for m in matches if m.a not in fed]
        chunks = _chunks(a, inner, first, memory // 4, threads)
    chunks[0] = [*(m.a for m in matches if m.a in fed), *chunks[0]]
    for index, chunk in enumerate(chunks):
        if progress is not None:
            progress(index, len(chunks), "comparing layers")
        _compare_chunk(a, b, feeds, [layers[name] for name in chunk], threads)
    trace(layers)
    return list(layers.values())


def _chunks(model: ir.Model, names: Sequence[str], feed: Feeds, cap: int, threads: int | None) -> list[list[str]]:
    """``names`` in groups whose values take at most ``cap`` bytes, where shapes follow from those of the inputs.

    The others are measured, a few at a time: measuring keeps what it measures alive.
    """
    sizes = _sizes(model, feed)
    chunks: list[list[str]] = [[]]
    total = 0
    for name in (n for n in names if n in sizes):
        if chunks[-1] and total + sizes[name] > cap:
            chunks.append([])
            total = 0
        chunks[-1].append(name)
        total += sizes[name]
    rest = [n for n in names if n not in sizes]
    fed = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
    for start in range(0, len(rest), _MEASURED):
        group = rest[start : start + _MEASURED]
        chunks += tap_chunks(typed(by_onnx_ir(model, fed, group)), group, feed, cap=cap, threads=threads)
    return chunks


def _sizes(model: ir.Model, feed: Feeds) -> dict[str, int]:
    """Bytes by name, as far as onnx can infer shapes from those of ``feed``."""
    fixed = clone(model)
    for value in fixed.graph.inputs:
        if (value.name or "") in feed:
            value.shape = ir.Shape(feed[value.name or ""].shape)
    made = [v for node in fixed.graph for v in node.outputs]
    for value in made:
        value.shape = None  # declared for symbolic inputs, it would stand in the way
    found: dict[str, int] = {}
    for node in typed(fixed).graph:
        for value in node.outputs:
            shape = static_shape(value)
            if shape is not None and value.dtype is not None and value.dtype != ir.DataType.STRING:
                found[value.name or ""] = math.prod(shape) * value.dtype.bitwidth // 8
    return found


class _Of:
    """Says which model a failure belongs to."""

    def __init__(self, which: str) -> None:
        self._which = which

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeFailure):
            raise RuntimeFailure(f"{self._which}: {error}") from error


class Tapped:
    """A model cut down to what a few of its values need; ``which`` model it is, for errors."""

    def __init__(self, model: ir.Model, names: Iterable[str], which: str, threads: int | None) -> None:
        fed = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
        self._names = [n for n in dict.fromkeys(names) if n not in fed]
        self._which = which
        self._session: Session | None = None
        if self._names:
            piece = by_onnx_ir(model, fed, self._names)
            for output in piece.graph.outputs:
                output.shape = None  # where the model declares a wrong one the runtime would object
            with _Of(which):
                self._session = Session(piece, optimize=False, threads=threads)

    def run(self, feed: Feeds) -> dict[str, Any]:
        """The values by name, and those of ``feed``."""
        if self._session is None:
            return dict(feed)
        with _Of(self._which):
            return {**feed, **self._session.run(feed, self._names)}


def _compare_chunk(a: ir.Model, b: ir.Model, feeds: Ask, layers: Sequence[Layer], threads: int | None) -> None:
    one = Tapped(a, (layer.match.a for layer in layers), "A", threads)
    other = Tapped(b, (n for layer in layers for n in (layer.match.b, layer.match.after) if n), "B", threads)
    for sample, feed in enumerate(feeds()):
        before = one.run(feed)
        if sample == 0:
            _probe(one, feed, before, layers)
        after = other.run(feed)
        for layer in layers:
            m = layer.match
            value, theirs = before[m.a], after[m.b]
            _add(layer.direct, value, theirs)
            if layer.after is not None and m.after is not None:
                _add(layer.after, value, after[m.after])
            layer.odd_a.add(value, sample)
            layer.odd_b.add(theirs, sample)


def _probe(one: Tapped, feed: Feeds, before: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """What the original itself does not repeat, and how far it moves when its inputs do."""
    again = one.run(feed)
    for layer in layers:
        value = before[layer.match.a]
        difference = Distance(layer.match.a)
        if not np.array_equal(value, again[layer.match.a]):  # NaN is not equal to itself: then look closer
            _add(difference, value, again[layer.match.a])
        layer.nondeterministic = difference.max_abs > 0 or difference.mismatch is not None
        if isinstance(value, np.ndarray):
            layer.kind, layer.itemsize = value.dtype.kind, value.dtype.itemsize
    del again
    moved = one.run({k: _next(v) for k, v in feed.items()})
    for layer in layers:
        _add(layer.noise, before[layer.match.a], moved[layer.match.a])


def _next(array: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.nextafter(array, np.asarray(np.inf, array.dtype))) if array.dtype.kind == "f" else array


def _add(difference: Distance, a: Any, b: Any) -> None:
    """``difference.add`` in blocks, floats of two widths as numbers, and without what both hold as "minus infinity"."""
    arrays = isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.shape == b.shape and a.dtype != object
    if not arrays or (a.dtype != b.dtype and {a.dtype.kind, b.dtype.kind} != {"f"}):
        difference.add(a, b)
        return
    limit = _HUGE_HALF if a.dtype.itemsize == 2 else _HUGE
    for x, y in _blocks(a, b):
        if x.dtype != y.dtype:
            wide = np.promote_types(x.dtype, y.dtype)
            x, y = x.astype(wide), y.astype(wide)
        if x.dtype.kind == "f" and (masked := _masked(x, limit)).any():
            # An attention mask: its square would hide every other difference.
            masked &= _masked(y, limit) & (np.signbit(x) == np.signbit(y))
            x, y = x[~masked], y[~masked]
        difference.add(x, y)


def _masked(array: NDArray[Any], limit: float) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        found: NDArray[np.bool_] = (np.abs(array) >= limit) & np.isfinite(array)
        return found


def _blocks(a: NDArray[Any], b: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    flat, other = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK], other[start : start + BLOCK]
