"""Every pass by itself over onnx.backend.test's models and variants of them, compared in ONNX Runtime.

    python tools/conformance.py [--pass NAME]... [--variant NAME]... [--limit N] [--jobs N] [--kind node]...

Prints one row per pass: models tried, changed, invalid afterwards (or with another interface), wrong in numbers,
crashed, grown by more than 10 % and 1 kB; then every failure by name. Exits 1 where there is one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node
from onnx import TensorProto, helper, numpy_helper

from graphopt import registry
from graphopt.base import Context, Pass
from graphopt.errors import GraphoptError, RuntimeFailure
from graphopt.manager import PassManager
from graphopt.model import graphs, interface, load, to_bytes, to_proto
from graphopt.session import Session
from graphopt.validation import unstable

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")
COLUMNS = ("cases", "changed", "invalid", "wrong", "crashed", "grown")
ROUNDING = {"fuse-batchnorm", "fuse-into-conv", "matmul-to-gemm", "simplify", "upgrade-opset"}
"""Passes that may move a float by rounding; all others must leave every bit."""
MAY_GROW = {"inline-functions", "upgrade-opset"}

Feeds = dict[str, Any]
Case = tuple[onnx.ModelProto, Feeds]


@dataclass
class Tally:
    """What happened, counted per pass and column; failures in words."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Put another worker's counts on top."""
        self.counts.update(other.counts)
        self.failures += other.failures


@dataclass(frozen=True)
class Source:
    """A model of onnx's and its first inputs, those that are tensors."""

    name: str
    read: Callable[[], Case]


@lru_cache
def sources(kinds: tuple[str, ...] = KINDS) -> list[Source]:
    """All cases, in order; those of single nodes are made by onnx in memory."""
    found: list[Source] = []
    if "node" in kinds:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            made = onnx.backend.test.case.node.collect_testcases(None)
        found += [Source(case.name, partial(_made, case)) for case in made]
    for kind in kinds:
        files = sorted((DATA / kind).glob("*/model.onnx")) or sorted((DATA / kind).glob("*.onnx"))
        found += [Source(str(file.relative_to(DATA)), partial(_stored, file)) for file in files]
    return found


def _made(case: Any) -> Case:
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    feeds: Feeds = {}
    for value, given in zip(proto.graph.input, case.data_sets[0][0] if case.data_sets else (), strict=False):
        if isinstance(given, TensorProto):
            feeds[value.name] = given
        elif isinstance(given, (np.ndarray, np.generic)):
            feeds[value.name] = numpy_helper.from_array(np.asarray(given))
    return proto, feeds


def _stored(file: Path) -> Case:
    proto = onnx.load(file)
    feeds: Feeds = {}
    weights = {t.name for t in proto.graph.initializer}
    for index, value in enumerate(v for v in proto.graph.input if v.name not in weights):
        path = file.parent / "test_data_set_0" / f"input_{index}.pb"
        if path.is_file() and value.type.HasField("tensor_type"):
            feeds[value.name] = TensorProto.FromString(path.read_bytes())
    return proto, feeds


def as_it_is(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """The model itself."""
    return proto, feeds


def _constant(proto: onnx.ModelProto, feeds: Feeds, keep: int) -> Case | None:
    names = [v.name for v in proto.graph.input]
    fixed = [n for n in names[keep:] if n in feeds]
    if not fixed or proto.ir_version < 4:
        return None
    for name in fixed:
        tensor = TensorProto()
        tensor.CopyFrom(feeds[name])
        tensor.name = name
        proto.graph.initializer.append(tensor)
    kept = [v for v in proto.graph.input if v.name not in fixed]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return proto, {k: v for k, v in feeds.items() if k not in fixed}


def rest_constant(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """All inputs but the first made initializers."""
    return _constant(proto, feeds, 1)


def all_constant(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """All inputs made initializers."""
    return _constant(proto, feeds, 0)


def in_branches(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """The nodes in both branches of an If that is decided at run time."""
    graph = proto.graph
    outputs = [o.name for o in graph.output]
    if not set(outputs) <= {n for node in graph.node for n in node.output} or "go" in {v.name for v in graph.input}:
        return None
    branches = []
    for prefix in ("then_", "else_"):
        made = {n for node in graph.node for n in node.output if n}
        nodes = [_renamed(node, {n: prefix + n for n in made}) for node in graph.node]
        results = [_renamed_value(o, prefix + o.name) for o in graph.output]
        branches.append(helper.make_graph(nodes, f"{prefix}branch", [], results))
    node = helper.make_node("If", ["go"], outputs, then_branch=branches[0], else_branch=branches[1], name="decide")
    del graph.node[:], graph.value_info[:]
    graph.node.append(node)
    graph.input.append(helper.make_tensor_value_info("go", TensorProto.BOOL, []))
    return proto, feeds | {"go": numpy_helper.from_array(np.array(True))}


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """A copy that reads and makes the new names, its bodies included (a body's own names are left)."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(n, n) for n in copy.input]
    copy.output[:] = [names.get(n, n) for n in copy.output]
    for attribute in copy.attribute:
        for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
            own = {v.name for v in body.input} | {t.name for t in body.initializer}
            own |= {n for inner in body.node for n in inner.output}
            outer = {k: v for k, v in names.items() if k not in own}
            inside = [_renamed(inner, outer) for inner in body.node]
            del body.node[:]
            body.node.extend(inside)
    return copy


def _renamed_value(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def in_function(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """The nodes in a function of the model's own, which the graph calls."""
    graph = proto.graph
    made = {n for node in graph.node for n in node.output}
    if proto.ir_version < 4 or not {o.name for o in graph.output} <= made or proto.functions:
        return None
    proto.ir_version = max(proto.ir_version, 8)  # the first with functions
    inputs = list(dict.fromkeys([*(v.name for v in graph.input), *(t.name for t in graph.initializer)]))
    outputs = [o.name for o in graph.output]
    function = helper.make_function("mine", "Body", inputs, outputs, list(graph.node), list(proto.opset_import))
    del graph.node[:], graph.value_info[:]
    graph.node.append(helper.make_node("Body", inputs, outputs, domain="mine", name="call"))
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    return proto, feeds


def with_symbols(proto: onnx.ModelProto, feeds: Feeds) -> Case | None:
    """Every dim of inputs and outputs a symbol of its own, nothing declared of the rest."""
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"{value.name}_{axis}"
    return proto, feeds


VARIANTS: dict[str, Callable[[onnx.ModelProto, Feeds], Case | None]] = {
    "plain": as_it_is,
    "rest-constant": rest_constant,
    "all-constant": all_constant,
    "if": in_branches,
    "function": in_function,
    "symbols": with_symbols,
}


class Reference:
    """The model before: what it is, and what it computes, found out when first asked."""

    def __init__(self, proto: onnx.ModelProto, feeds: Feeds) -> None:
        self.proto = proto
        self.model = load(proto)
        self.size = len(to_bytes(self.model))
        self._feeds = feeds
        self._valid: bool | None = None
        self._ran: tuple[Feeds, dict[str, Any], set[str]] | str | None = "not yet"

    @property
    def valid(self) -> bool:
        """Whether onnx's checker accepts it."""
        if self._valid is None:
            self._valid = problem(to_proto(self.model)) is None
        return self._valid

    @property
    def ran(self) -> tuple[Feeds, dict[str, Any], set[str]] | None:
        """(inputs, outputs, which of them are random), or None where it does not run."""
        if isinstance(self._ran, str):
            self._ran = None
            try:
                feeds = {k: numpy_helper.to_array(v) for k, v in self._feeds.items()}
                session = Session(self.proto, optimize=False, threads=1)
                outputs = session.run(feeds)
                self._ran = feeds, outputs, unstable(session, feeds)
            except (RuntimeFailure, ValueError, TypeError):  # the runtime lacks it, or numpy its type
                pass
        return self._ran


def problem(proto: onnx.ModelProto) -> str | None:
    """What onnx's checker says against it."""
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # it raises what its C++ throws
        return " ".join(str(error).split())[:200]
    return None


def judge(reference: Reference, pass_: Pass) -> tuple[str | None, str]:
    """(column, why) of what the pass did to the model; (None, "") where it changed nothing."""
    result = PassManager([pass_], verify="off").run(reference.model, Context(original=reference.model, threads=1))
    entry = result.ledger[0]
    if entry.status == "reverted":
        return "crashed", str(entry.reason)
    if not entry.changes:
        return None, ""
    after = to_proto(result.model)
    if interface(result.model) != interface(reference.model):
        return "invalid", "the interface changed"
    if reference.valid and (why := problem(after)) is not None:
        return "invalid", why
    if reference.ran is not None:
        feeds, outputs, random = reference.ran
        try:
            got = Session(after, optimize=False, threads=1).run(feeds)
        except RuntimeFailure as error:
            return "invalid", str(error)
        for name, value in outputs.items():
            loose = pass_.name in ROUNDING or in_half_precision(reference.proto)
            if name not in random and not equal(value, got[name], rounding=loose):
                return "wrong", f"output '{name}'"
    size = len(to_bytes(result.model))
    if size > 1.1 * reference.size and size > reference.size + 1024 and pass_.name not in MAY_GROW:
        return "grown", f"{reference.size} -> {size} bytes"
    return "changed", ""


def in_half_precision(proto: onnx.ModelProto) -> bool:
    """Whether 16-bit floats occur: there the runtime's rounding depends on what stands beside a node.

    It runs a node between single-precision ones in single precision, also with its optimizations off.
    """
    for graph in (*graphs(proto), *proto.functions):
        values = (*graph.input, *graph.output, *graph.initializer) if isinstance(graph, onnx.GraphProto) else ()
        kinds = {v.data_type if isinstance(v, TensorProto) else v.type.tensor_type.elem_type for v in values}
        kinds |= {a.i for n in graph.node for a in n.attribute if a.name in ("to", "dtype", "softmax_precision")}
        kinds |= {a.t.data_type for n in graph.node for a in n.attribute if a.HasField("t")}
        if kinds & {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
            return True
    return False


def equal(a: Any, b: Any, *, rounding: bool) -> bool:
    """The same bits, or (``rounding``) the same but for the last bits of floats."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k], rounding=rounding) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y, rounding=rounding) for x, y in zip(a, b, strict=True))
    x, y = np.asarray(a), np.asarray(b)
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.dtype == object:
        return bool((x == y).all())
    if not rounding or x.dtype.kind != "f":
        return x.tobytes() == y.tobytes()
    scale = float(np.abs(x[np.isfinite(x)]).max(initial=0.0))
    step = float(np.finfo(x.dtype).eps)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    return bool(np.allclose(wide_x, wide_y, rtol=max(1e-4, 8 * step), atol=max(1e-5, 2 * step) * scale, equal_nan=True))


def run_case(source: Source, names: Sequence[str], variants: Sequence[str]) -> Tally:
    """One case in all variants through all passes."""
    tally = Tally()
    for variant in variants:
        made = VARIANTS[variant](*source.read())
        if made is None:
            continue
        try:
            reference = Reference(*made)
        except GraphoptError as error:
            tally.failures.append(f"not loaded: {source.name} [{variant}]: {error}")
            continue
        for name in names:
            tally.counts[name, "cases"] += 1
            column, why = judge(reference, registry.create(name, {}))
            if column is not None:
                tally.counts[name, column] += 1
            if why:
                tally.counts[name, "changed"] += column != "crashed"
                tally.failures.append(f"{column}: {name} on {source.name} [{variant}]: {why}")
    return tally


def run_cases(arguments: tuple[list[int], tuple[str, ...], Sequence[str], Sequence[str]]) -> Tally:
    """Several cases, by their numbers, for one worker."""
    numbers, kinds, names, variants = arguments
    tally = Tally()
    for number in numbers:
        tally.add(run_case(sources(kinds)[number], names, variants))
    return tally


def table(tally: Tally, names: Sequence[str]) -> Iterator[str]:
    """The rows to print."""
    width = max(map(len, names))
    yield "pass".ljust(width) + "".join(column.rjust(9) for column in COLUMNS)
    for name in names:
        yield name.ljust(width) + "".join(str(tally.counts[name, column]).rjust(9) for column in COLUMNS)


def exact_passes() -> list[str]:
    """The passes held to their word here: exact ones of our own that need no child process and no calibration data."""
    return [n for n in registry.PASSES if registry.get(n).contract == "exact" and n not in ("simplify", "smooth")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="passes", action="append", help="only this pass (may be repeated)")
    parser.add_argument("--variant", dest="variants", action="append", choices=list(VARIANTS))
    parser.add_argument("--kind", dest="kinds", action="append", choices=KINDS)
    parser.add_argument("--limit", type=int, help="only so many cases, evenly spread")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    names = options.passes or exact_passes()
    variants = options.variants or list(VARIANTS)
    kinds = tuple(options.kinds or KINDS)
    total = len(sources(kinds))
    limit = min(options.limit or total, total)
    chosen = [i * total // limit for i in range(limit)]
    tally = Tally()
    work = [(chosen[i : i + 20], kinds, names, variants) for i in range(0, limit, 20)]
    if options.jobs > 1:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
            for part in pool.map(run_cases, work):
                tally.add(part)
    else:
        for piece in work:
            tally.add(run_cases(piece))
    print("\n".join([*table(tally, names), *tally.failures]))
    return 1 if any(tally.counts[name, c] for name in names for c in ("invalid", "wrong", "crashed", "grown")) else 0


if __name__ == "__main__":
    sys.exit(main())
