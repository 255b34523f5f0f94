"""Random graphs through the default exact passes, compared with the originals in ONNX Runtime.

    python tools/fuzz.py [--graphs 2000] [--seed 0] [--simplify-every 50] [--seconds S] [--keep FOLDER]

Of every graph: it is still valid, with the same interface; its outputs are the same at two sizes of the symbolic dims
and with overridable initializers overridden (the same bits, or the same but for rounding behind layers that are
fused); a second run changes no byte; and with other names and another order of nodes the result is the same graph.
Verification is off: what it would catch must not happen. Prints every failure, then counts; exits 1 where there is one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from growing_layers import Made, make

from graphopt.base import Context, Pipeline, Repeat
from graphopt.errors import RuntimeFailure
from graphopt.manager import PassManager
from graphopt.model import interface, load, to_bytes, to_proto
from graphopt.model_diff import diff
from graphopt.presets import exact_passes
from graphopt.session import Session

COLUMNS = ("graphs", "run", "changed", "nodes before", "nodes after")
KINDS = ("reverted", "invalid", "interface", "wrong", "not idempotent", "depends on names")


def ours() -> Pipeline:
    """The default passes, without the one that starts a process."""
    return [step for step in exact_passes() if isinstance(step, Repeat)][:1]


def examine(made: Made, pipeline: Pipeline, rnd: random.Random) -> tuple[Counter[str], list[str]]:
    """What there is to count of one graph, and what is wrong, each ``kind: why``."""
    counts: Counter[str] = Counter(graphs=1)
    try:
        expected = results(made.model, made)
    except RuntimeFailure:  # an operator that this runtime lacks for that type
        return counts, []
    counts["run"] = 1
    model = load(made.model)
    done = PassManager(pipeline, verify="off").run(model, Context(original=model, threads=1))
    problems = [f"reverted: {e.name}: {e.reason}" for e in done.reverted]
    after = to_proto(done.model)
    counts["changed"] = any(e.changes for e in done.ledger)
    counts["nodes before"], counts["nodes after"] = len(made.model.graph.node), len(after.graph.node)
    try:
        onnx.checker.check_model(after, full_check=True)
    except Exception as error:  # it raises what its C++ throws
        return counts, [*problems, f"invalid: {' '.join(str(error).split())[:200]}"]
    mine, theirs = ((interface(m), _overridable(m)) for m in (model, done.model))
    if mine != theirs:
        problems.append(f"interface: {mine} -> {theirs}")
    problems += compare(expected, after, made)
    first = to_bytes(done.model)
    again = PassManager(pipeline, verify="off").run(load(first), Context(original=load(first), threads=1))
    if to_bytes(again.model) != first:
        changes = [f"{e.name} {c.action} {c.site}" for e in again.ledger for c in e.changes]
        problems.append(f"not idempotent: {changes[:3]}")
    other = load(renamed(shuffled(made.model, rnd)))
    twin = PassManager(pipeline, verify="off").run(other, Context(original=other, threads=1))
    found = diff(after, to_proto(twin.model))
    sections = ("nodes", "weights", "interface", "model")
    shown = [f"{s}: {vars(d)}" for s in sections for d in found.section(s) if not _stored(d)]
    if shown:
        problems.append(f"depends on names: {' | '.join(shown)[:300]}")
    return counts, problems


def _stored(difference: Any) -> bool:
    """Whether a weight is only an initializer here and a Constant there: the first of two equal ones is kept."""
    return [what for what, _, _ in difference.edits] == ["stored as"]


def _overridable(model: Any) -> list[str]:
    return sorted(v.name for v in model.graph.inputs if v.name in model.graph.initializers)


def results(model: onnx.ModelProto, made: Made) -> list[dict[str, Any]]:
    """Outputs at both sizes, and overridden."""
    session = Session(model, optimize=False, threads=1)
    feeds = [*made.feeds, made.feeds[0] | made.overridable] if made.overridable else made.feeds
    return [session.run(feed) for feed in feeds]


def compare(expected: list[dict[str, Any]], after: onnx.ModelProto, made: Made) -> Iterator[str]:
    """Outputs that are not as they were."""
    try:
        got = results(after, made)
    except RuntimeFailure as error:
        yield f"wrong: {error}"
        return
    for run, (before, now) in enumerate(zip(expected, got, strict=True)):
        for name, array in before.items():
            if name not in now:
                yield f"wrong: run {run}, output '{name}' is gone"
            elif not equal(array, now[name], loose=name in made.loose):
                yield f"wrong: run {run}, output '{name}': {describe(array, now[name])}"


def equal(a: Any, b: Any, *, loose: bool) -> bool:
    """The same bits (any NaN is any other), or but for rounding."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    if not loose:
        return bool((((a == b) & (np.signbit(a) == np.signbit(b))) | ((a != a) & (b != b))).all())
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.abs(x[np.isfinite(x)])
    step = 1e-4 if a.dtype.itemsize > 2 else 2e-2
    return bool(np.allclose(x, y, rtol=step, atol=step * max(1.0, float(finite.max(initial=0)) / 10), equal_nan=True))


def describe(a: Any, b: Any) -> str:
    """How they differ, in a few words."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
    where = np.flatnonzero(~((a == b) | ((a != a) & (b != b))))
    at = int(where[0]) if where.size else 0
    return f"{a.reshape(-1)[at]!r} -> {b.reshape(-1)[at]!r} at {at} of {a.size}"


# The same model, told otherwise


def shuffled(model: onnx.ModelProto, rnd: random.Random) -> onnx.ModelProto:
    """Another order of nodes and weights in the main graph, just as valid."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    known = {"", *(v.name for v in graph.input), *(t.name for t in graph.initializer)}
    left, order = list(graph.node), []
    made = {n for node in left for n in node.output}
    while left:
        ready = [node for node in left if _read(node) & made <= known]
        node = rnd.choice(ready)
        left.remove(node)
        order.append(node)
        known |= set(node.output)
    order = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
    del graph.node[:]
    graph.node.extend(order)
    weights = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer]
    rnd.shuffle(weights)
    del graph.initializer[:]
    graph.initializer.extend(weights)
    return copy


def _read(node: onnx.NodeProto) -> set[str]:
    bodies = [a.g for a in node.attribute if a.HasField("g")]
    return set(node.input) | {n for g in bodies for inner in g.node for n in _read(inner)} | {
        o.name for g in bodies for o in g.output
    }  # fmt: skip


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Other names for nodes and inner values, everywhere."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {v.name for v in (*copy.graph.input, *copy.graph.output)} | {""}
    names: dict[str, str] = {}

    def name(old: str) -> str:
        return old if old in kept else names.setdefault(old, f"other_{len(names)}")

    def visit(graph: onnx.GraphProto, top: bool) -> None:
        for value in (*graph.initializer, *([] if top else (*graph.input, *graph.output)), *graph.value_info):
            value.name = name(value.name)
        for node in graph.node:
            node.name = f"node_{name(node.output[0])}"
            node.input[:] = [name(n) for n in node.input]
            node.output[:] = [name(n) for n in node.output]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g, False)

    visit(copy.graph, True)
    return copy


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph; the next have the next numbers")
    parser.add_argument("--simplify-every", type=int, default=50, help="how often onnxsim takes part, which is slow")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--keep", type=Path, help="a folder for the graphs that fail")
    options = parser.parse_args(arguments)
    total: Counter[str] = Counter()
    failed, end = 0, time.monotonic() + options.seconds
    for seed in range(options.seed, options.seed + options.graphs):
        if time.monotonic() > end:
            break
        made = make(random.Random(seed))
        pipeline = ours() if (seed + 1) % options.simplify_every else exact_passes()
        counts, problems = examine(made, pipeline, random.Random(seed))
        total.update(counts)
        total.update({p.partition(":")[0] for p in problems})
        failed += bool(problems)
        for problem in problems:
            print(f"{seed}: {problem}", flush=True)  # a long run is watched
        if problems and options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            onnx.save(made.model, options.keep / f"{seed}.onnx")
    print("\n".join(f"{name:18}{total[name]:8}" for name in (*COLUMNS, *KINDS)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
