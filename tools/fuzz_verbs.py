"""Random graphs through the verbs that write a model, each result held to what is promised of it.

    python tools/fuzz_verbs.py quantize|prune|compress|halves [--graphs 2000] [--seed 0] [--seconds S] [--keep FOLDER]

Of every result: it is valid, has the same interface, runs at both sizes and makes finite numbers where the original
does; the SQNR that the report tells is the one measured here, and where a floor was asked for it is kept; the same
model with other names and another order of nodes becomes the same graph; and a second run finds nothing, or changes
nothing (pruning aside: it is asked for a share of what is left). ``halves`` cuts the graph in two, optimizes or
compresses each for itself, and expects of both together what the whole gives. onnxsim takes no part: a second to start.
Prints every failure, then counts; exits 1 where there is one.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fuzz
import halves
import numpy as np
import onnx
from growing_layers import GROWN, LAYERED, WIDE, Made, make, wide_stack

import graphopt
from graphopt.base import Context
from graphopt.errors import GateFailed, GraphoptError, NothingDone, PreconditionError, RuntimeFailure
from graphopt.manager import PassManager
from graphopt.model import interface, load, to_bytes, to_proto
from graphopt.model_diff import diff
from graphopt.passes.simplify import Simplify
from graphopt.pipeline import Result
from graphopt.session import Session

FLOOR = 12.0
"""dB that are asked for in every third graph."""
FORMATS = ("int8", "int8-block", "int4", "uint4", "palette8", "palette4", "fp16", "bf16")
GROWERS = {"compress": WIDE, "halves": (*GROWN, *(wide_stack,) * 4)}
Do = Callable[[Any, Made, random.Random], Result]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=[*VERBS, "halves"])
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph; the next have the next numbers")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--keep", type=Path, help="a folder for the graphs that fail")
    options = parser.parse_args(arguments)
    total: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    failed, end = 0, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("error")  # they would stand on a user's screen
        tempfile.tempdir = folder  # reproducers
        without_onnxsim()
        for seed in range(options.seed, options.seed + options.graphs):
            if time.monotonic() > end:
                break
            made = make(random.Random(seed), 18, GROWERS.get(options.verb, LAYERED))
            counts, problems = examine(options.verb, made, seed)
            refusals.update(name for name in counts if name.startswith("refused: "))
            total.update({name: n for name, n in counts.items() if not name.startswith("refused: ")})
            failed += bool(problems)
            for problem in problems:
                print(f"{seed}: {problem}", flush=True)
            if problems and options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                onnx.save(made.model, options.keep / f"{options.verb}-{seed}.onnx")
    tempfile.tempdir = None
    print("\n".join(f"{count:8} {name}" for name, count in refusals.most_common(12)))
    print(f"{options.verb}: " + ", ".join(f"{total[n]} {n}" for n in ("graphs", "run", "done", "changed")), end="")
    print(f", {failed} wrong")
    return 1 if failed else 0


def without_onnxsim() -> None:
    """It is a pass like any other, and always refuses."""

    def check(self: Simplify, model: Any) -> None:
        raise PreconditionError("left out here; nothing to do")

    Simplify.check = check  # type: ignore[method-assign]


def quantize(model: Any, made: Made, rnd: random.Random) -> Result:
    floor = FLOOR if rnd.random() < 0.35 else None
    options: dict[str, Any] = {"weights": rnd.choice(["auto", "s8", "u8"])} if rnd.random() < 0.5 else {}
    if rnd.random() < 0.15:
        options = {"mode": "dynamic", "eval_data": made.feeds}
    else:
        options |= {"data": made.feeds, "eval_data": made.feeds}
    return graphopt.quantize(model, allow_slower=True, placement="rules", time=0, threads=1, min_sqnr=floor, **options)


def compress(model: Any, made: Made, rnd: random.Random) -> Result:
    form = rnd.choice(FORMATS)
    return graphopt.compress(model, weights=form, block=rnd.choice([16, 32]), eval_data=made.feeds, time=0, threads=1)


def prune(model: Any, made: Made, rnd: random.Random) -> Result:
    how: dict[str, Any] = {"ratio": rnd.choice([0.2, 0.5])} if rnd.random() < 0.5 else {"macs": 0.7}
    if rnd.random() < 0.3:
        how |= {"importance": "l2", "repair": "none"}
    return graphopt.prune(
        model, data=made.feeds, eval_data=made.feeds, multiple=1, allow_slower=True, time=0, threads=1, **how
    )


VERBS: dict[str, Do] = {"quantize": quantize, "compress": compress, "prune": prune}


def examine(verb: str, made: Made, seed: int) -> tuple[Counter[str], list[str]]:
    """What there is to count of one graph, and what is wrong."""
    counts: Counter[str] = Counter(graphs=1)
    try:
        expected = fuzz.results(made.model, made)
    except RuntimeFailure:  # an operator that this runtime lacks for that type
        return counts, []
    counts["run"] = 1
    try:
        if verb == "halves":
            return counts, list(_halves(made, expected, random.Random(seed), counts))
        return counts, list(_result(verb, made, expected, seed, counts))
    except (NothingDone, GateFailed, GraphoptError) as error:
        counts[f"refused: {type(error).__name__}: {_general(error)}"] = 1
        if int(error.exit_code) == 4:
            return counts, [f"internal: {error}"]
        return counts, []
    except Exception as error:
        return counts, [f"crash: {type(error).__name__}: {error}"]


def _general(error: Exception) -> str:
    """The message without names and numbers, to be counted."""
    text = str(error).split("(")[0][:60]
    return "".join("#" if c.isdigit() else c for c in text)


def _result(verb: str, made: Made, expected: list[dict[str, Any]], seed: int, counts: Counter[str]) -> Iterator[str]:
    do = VERBS[verb]
    result = do(made.model, made, random.Random(seed))
    counts["done"] = 1
    after = result.model
    counts["changed"] = any(entry["changes"] for entry in result.report["ledger"])
    yield from (f"reverted: {e['pass']}: {e['reason']}" for e in result.report["ledger"] if e["status"] == "reverted")
    try:
        onnx.checker.check_model(after, full_check=True)
    except Exception as error:  # it raises what its C++ throws
        yield f"invalid: {' '.join(str(error).split())[:200]}"
        return
    if interface(load(made.model)) != interface(load(after)):
        yield f"interface: {interface(load(made.model))} -> {interface(load(after))}"
    yield from _numbers(result, after, made, expected)
    yield from _again(verb, do, result, made, seed)
    other = do(fuzz.renamed(fuzz.shuffled(made.model, random.Random(seed))), made, random.Random(seed))
    found = diff(after, other.model)
    shown = [f"{s}: {vars(d)}" for s in ("nodes", "weights", "interface") for d in found.section(s)]
    shown = [text for text in shown if "stored as" not in text]
    if shown:
        yield f"depends on names: {' | '.join(shown)[:400]}"


def _numbers(result: Result, after: onnx.ModelProto, made: Made, expected: list[dict[str, Any]]) -> Iterator[str]:
    """Outputs of the right shape, finite where they were; as far from the original's as the report says."""
    for optimize in (False, True):
        session = Session(after, optimize=optimize, threads=1)
        try:
            got = [session.run(feed) for feed in made.feeds]
        except RuntimeFailure as error:
            yield f"does not run ({optimize=}): {error}"
            return
        if optimize:
            break
        plain = got
    for run, (before, now) in enumerate(zip(expected, plain, strict=False)):
        for name, array in before.items():
            if now[name].dtype != array.dtype or now[name].shape != array.shape:
                yield f"wrong: run {run}, output '{name}': {fuzz.describe(array, now[name])}"
            elif array.dtype.kind == "f" and (np.isfinite(array).all() and np.isnan(now[name]).any()):
                yield f"wrong: run {run}, output '{name}' has NaN"
    told = result.report.get("comparison") or {}
    rows = {row["output"]: row for row in told.get("outputs", [])}
    if not rows:
        yield f"the report compares nothing: {list(told)}"
    for name in expected[0]:
        noise, signal = _noise([r[name] for r in expected[: len(got)]], [r[name] for r in got])
        if noise is None or name not in rows or rows[name]["mismatch"]:
            continue
        db = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
        said = rows[name]["sqnr_db"]
        said = math.inf if said is None and rows[name]["identical"] else -math.inf if said is None else said
        if not (db == said or abs(db - said) < 0.5 or min(db, said) > 80):
            yield f"the report says {said:.2f} dB of output '{name}', and it is {db:.2f}"
        if result.options is not None and result.options.gates.min_sqnr and db < FLOOR - 0.1:
            yield f"{FLOOR} dB were asked for, and output '{name}' has {db:.2f}"


def _noise(before: list[Any], now: list[Any]) -> tuple[float | None, float]:
    """Sums of squares of the difference and of what was; None where there is something that is no finite float."""
    noise = signal = 0.0
    for a, b in zip(before, now, strict=True):
        if a.dtype.kind != "f" or a.shape != b.shape:
            return None, 0.0
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            return None, 0.0
        noise += float(np.square(x - y).sum())
        signal += float(np.square(x).sum())
    return noise, signal


def _again(verb: str, do: Do, result: Result, made: Made, seed: int) -> Iterator[str]:
    """A second run of what changes nothing but what it finds."""
    if verb == "prune":
        return
    first = to_bytes(result.ir_model)
    try:
        again = do(first, made, random.Random(seed))
    except (NothingDone, GateFailed):
        return
    except PreconditionError as error:
        if "quantized already" not in str(error):
            yield f"a second run is refused: {error}"
        return
    if to_bytes(again.ir_model) != first:
        done = [f"{e['pass']} {c}" for e in again.report["ledger"] for c in e["changes"]]
        yield f"not idempotent: {done[:3]}"


def _halves(made: Made, expected: list[dict[str, Any]], rnd: random.Random, counts: Counter[str]) -> Iterator[str]:
    """Each half through the exact passes, and through weights in int8; together they do what the whole does so."""
    parts = halves.halves(made.model, rnd)
    if parts is None:
        return
    counts["done"] = 1
    exact, packed = [], []
    for part in parts:
        model = load(part)
        done = PassManager(fuzz.ours(), verify="off").run(model, Context(original=model, threads=1))
        counts["changed"] |= any(e.changes for e in done.ledger)
        exact.append(to_proto(done.model))
        packed.append(_packed(part))
    whole = Session(_packed(made.model), optimize=False, threads=1)
    for run, feed in enumerate(made.feeds):
        for label, got, wanted in (
            ("optimized", halves.run(exact, feed, Session), expected[run]),
            ("compressed", halves.run(packed, feed, Session), whole.run(feed)),
        ):
            for name, array in wanted.items():
                if not fuzz.equal(array, got[name], loose=name in made.loose):
                    yield f"halves {label}: run {run}, output '{name}': {fuzz.describe(array, got[name])}"


def _packed(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return graphopt.compress(model, weights="int8", rounding="nearest", time=0, threads=1, verify="off").model
    except (NothingDone, GateFailed):
        return model


if __name__ == "__main__":
    sys.exit(main())
