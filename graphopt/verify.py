"""Holding exact passes to "exact": the same outputs within the model's own noise, on more than one kind of input."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Pass
from graphopt.data import feeds as to_feeds
from graphopt.errors import InputError, RuntimeFailure
from graphopt.model import clone, interface
from graphopt.probes import probes, still
from graphopt.recipe import Recipe, write
from graphopt.session import Feeds, Loadable, Outputs, Session, loadable
from graphopt.storage import save
from graphopt.traversal import ir_graphs
from graphopt.validation import (
    OTHER_SIZES,
    Comparison,
    OutputDifference,
    exact_violation,
    moved,
    noise_by_feed,
    random_feeds,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feed = dict[str, NDArray[Any]]

REAL_SAMPLES = 4
TRIES = 4
"""Random inputs drawn at most to find one that the model runs on."""

SECOND_BATCH = 3
SECOND_SIZE = 13
"""What symbolic dims besides the batch are there, where the model runs with that: more than the usual 8."""

_OVERRIDE = 1.125
"""What overridable initializers in float are multiplied by, to see that a caller's own values still count."""


@dataclass(frozen=True)
class Violation:
    """Why a candidate is no exact rewrite, and the feed that shows it."""

    reason: str
    feed: int = 0


class _Remembering:
    """A session that runs on a feed once where :meth:`answer` was asked: whether a reference can run on it, its noise
    there and what is expected are all seen from the same outputs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._kept: dict[int, tuple[Feeds, Outputs]] = {}

    def answer(self, feed: Feed) -> Outputs:
        """What it says to a feed, kept with the feed (which stays alive, so that no other can be taken for it)."""
        if id(feed) not in self._kept:
            self._kept[id(feed)] = feed, self.session.run(feed)
        return self._kept[id(feed)][1]

    def run(self, feeds: Feeds) -> Outputs:
        """What is kept, else what it computes now."""
        kept = self._kept.get(id(feeds))
        return kept[1] if kept is not None else self.session.run(feeds)


class Verifier:
    """Compares candidates with one reference model, whose outputs, noise and feeds are made once.

    Feeds: the first real samples where there are any, and legal random ones, at a second batch size where the
    reference runs at it; or those given. ``unable`` says why no comparison is possible (custom operators, say);
    candidates then only have to load where the reference ``loads``. ``notes`` say what had to be left out.
    ``narrowed`` is what the reference became where fewer inputs were asked for: feeds and interface are its, and
    ``refused`` says that the reference runs, but on none of them. ``comparison`` is the last candidate that held
    against the reference, both optimized, where there is no data to do that on.
    """

    def __init__(
        self,
        reference: ir.Model,
        context: Context,
        narrowed: ir.Model | None = None,
        *,
        feeds: list[Feed] | None = None,
    ) -> None:
        facing = reference if narrowed is None else narrowed
        self.unable: str | None = None
        self.refused = False
        self.loads = False
        self.notes: list[str] = []
        self.feeds: list[Feed] = []
        self.noise: list[dict[str, float]] = []
        self.optimized: list[Outputs] = []  # where the last word could come from here
        self.comparison: Comparison | None = None
        self.threads = context.threads
        self.signature = _interface(facing)
        try:
            written = loadable(reference)
            plain = _Remembering(Session(written, optimize=False, threads=context.threads))
            self.loads = True
            self.refused = narrowed is not None
            chosen = _choose(facing, plain, context) if feeds is None else _Chosen(feeds, [], ["the inputs given"])
            self.refused = False
            optimized = _Remembering(Session(written, threads=context.threads))
            last_word = context.data is None and context.eval_data is None
            for feed in chosen.feeds if last_word else ():
                optimized.answer(feed)
            self._measure_noise(chosen, plain, optimized)
            self.expected = [plain.answer(feed) for feed in self.feeds]
            self.optimized = [optimized.answer(feed) for feed in self.feeds[: self.ordinary]] if last_word else []
            self.excluded = moved(self.expected[0], plain.session.run(self.feeds[0]))
        except (RuntimeFailure, InputError) as error:
            self.unable = str(error)
            return
        self._say_what_is_left_out()
        self._override(reference, facing)

    def _measure_noise(self, chosen: _Chosen, plain: _Remembering, optimized: _Remembering) -> None:
        """Noise per feed and output; feeds on which the reference itself is undecided are left out where it can be.

        Ordinary feeds share the largest noise among them; a probe is judged by its own.
        """
        self.feeds, words = chosen.feeds, list(chosen.words)
        each = noise_by_feed(plain, optimized, self.feeds)
        steady = [i for i, noise in enumerate(each) if _is_steady(noise)]
        if 0 < len(steady) < len(each):
            left = len(each) - len(steady)
            self.notes.append(f"{left} of {len(each)} inputs left out: NaN, Inf or shapes change there by themselves")
            self.feeds, each = [self.feeds[i] for i in steady], [each[i] for i in steady]
        shared = {name: max(noise[name] for noise in each) for name in each[0]}
        self.noise = [shared] * len(self.feeds)
        self.ordinary = len(self.feeds)
        for word, probe in chosen.probes:
            (own,) = noise_by_feed(plain, optimized, [probe], still=still)
            if _is_steady(own):
                self.feeds, self.noise = [*self.feeds, probe], [*self.noise, own]
                words.append(word)
        self.description = ", ".join(words)

    def _override(self, reference: ir.Model, facing: ir.Model) -> None:
        """What the reference computes where a caller overrides its initializers: all of them, or those in float."""
        for kinds in ("fiub", "f"):
            self.overrides = _overrides(facing, kinds)
            if not self.overrides:
                continue
            try:
                changed = Session(_overridden(reference, self.overrides), optimize=False, threads=self.threads)
                self.expected_overridden = changed.run(self.feeds[0])
                return
            except RuntimeFailure:  # an axis or a size may not be just any number
                self.overrides = {}

    def _say_what_is_left_out(self) -> None:
        self.notes += [f"output '{n}' is non-deterministic in the original: excluded" for n in sorted(self.excluded)]
        whole = {n for n, v in self.expected[0].items() if isinstance(v, np.ndarray) and v.dtype.kind in "iub"}
        for name, noise in self.noise[0].items():
            if name in self.excluded or (np.isfinite(noise) and (name not in whole or noise == 0)):
                continue
            held = f"held to differences of {noise:g} only" if np.isfinite(noise) else "not compared"
            self.notes.append(
                f"output '{name}' of the original changes with the runtime's optimizations or the last bit of the "
                f"input: {held}"
            )

    def violation(self, candidate: ir.Model) -> Violation | None:
        """Why ``candidate`` is no exact rewrite of the reference, or None; optimizations off and on."""
        self.comparison = None
        if _interface(candidate) != self.signature:
            return Violation("inputs or outputs have other names or types, or are not to be overridden any more")
        if self.unable is not None and not self.loads:
            return None  # numbers cannot be compared; the interface was
        try:
            written = loadable(candidate)
            if self.unable is not None:  # it runs on nothing we have: that it still loads is what can be seen
                Session(written, optimize=False, threads=self.threads)
                return None
        except RuntimeFailure as error:
            return Violation(str(error))
        # Probes without optimizations only: NaN and the like may come out otherwise where the runtime fuses.
        for optimize, count in ((False, len(self.feeds)), (True, self.ordinary)):
            found = self._differs(written, self.feeds[:count], self.expected[:count], optimize=optimize)
            if found is not None:
                return found
        if self.overrides:
            changed = loadable(_overridden(candidate, self.overrides))
            found = self._differs(changed, self.feeds[:1], [self.expected_overridden], optimize=False)
            if found is not None:
                return Violation(f"where a caller overrides the initializers, {found.reason}")
        return None

    def _differs(
        self, candidate: Loadable, feeds: list[Feed], expected: list[Outputs], *, optimize: bool
    ) -> Violation | None:
        index = 0
        kept = self.optimized if optimize else []
        compared = [OutputDifference(name, nondeterministic=name in self.excluded) for name in self.expected[0]]
        try:
            session = Session(candidate, optimize=optimize, threads=self.threads)
            for index, (feed, outputs) in enumerate(zip(feeds, expected, strict=True)):
                got = session.run(feed)
                differences = [OutputDifference(name) for name in outputs if name not in self.excluded]
                for difference in differences:
                    difference.add(outputs[difference.name], got[difference.name])
                found = exact_violation(Comparison(differences, 1), self.noise[index])
                if found is not None:
                    return Violation(found, index)
                for difference in compared if kept else ():
                    difference.add(kept[index][difference.name], got[difference.name])
        except RuntimeFailure as error:
            return Violation(str(error), index)
        if kept:
            self.comparison = Comparison(compared, len(kept))
        return None


def _is_steady(noise: Mapping[str, float]) -> bool:
    return not np.isinf(list(noise.values())).any()


@dataclass
class _Chosen:
    """Feeds that the reference runs on, probes by what they are, and what to call the feeds."""

    feeds: list[Feed]
    probes: list[tuple[str, Feed]]
    words: list[str]


def _choose(model: ir.Model, session: _Remembering, context: Context) -> _Chosen:
    """The feeds that the reference runs on."""
    inputs, _ = interface(model)
    failures: list[str] = []

    def usable(feed: Feed) -> bool:
        try:
            session.answer(feed)
        except RuntimeFailure as error:
            failures.append(str(error))
            return False
        return True

    def random(seed: int, batch: int | None = None, first: int | None = None) -> tuple[list[Feed], int | None]:
        for size in dict.fromkeys((first, *OTHER_SIZES)):
            try:
                made = random_feeds(model, TRIES, seed=seed, batch=batch, size=size)
            except InputError as error:  # an input that cannot be drawn
                failures.append(str(error))
                break
            found = list(islice(filter(usable, made), 1))
            if found:
                return found, size
        return [], None

    samples = islice(context.data, REAL_SAMPLES) if context.data is not None else ()
    real = [feed for feed in (to_feeds(sample, inputs) for sample in samples) if usable(feed)]
    other, size = random(context.seed)
    first = next(iter((*real, *other)), None)
    if first is None:
        raise RuntimeFailure(failures[0] if failures else "there is no input to run it on")
    second = random(context.seed + 1, SECOND_BATCH, SECOND_SIZE)[0] or [f for f in _stacked(real) if usable(f)]
    second = [feed for feed in second if any(feed[k].shape != first[k].shape for k in feed)]
    found: list[tuple[str, Feed]] = []
    if other:
        tries = probes(model, other[0], seed=context.seed + 2, size=size)
        for word, feeds in zip(("extremes", "NaN and infinities"), tries, strict=True):
            found += [(word, feed) for feed in islice(filter(usable, feeds), 1)]
    words = [f"{len(real)} real samples"] if real else []
    words += ["a random input"] if other else []
    words += ["another batch size"] if second else []
    return _Chosen(real + other + second, found, words)


def _stacked(feeds: list[Feed]) -> list[Feed]:
    """The first real samples as one batch, where they fit together."""
    some = feeds[:SECOND_BATCH]
    if len(some) < 2 or any(f[k].ndim == 0 or f[k].shape != some[0][k].shape for f in some for k in f):
        return []
    return [{k: np.concatenate([f[k] for f in some]) for k in some[0]}]


def _interface(model: ir.Model) -> list[Any]:
    """What a caller sees: names and types on both sides, and which inputs need not be fed."""
    sides = [[(v.name, v.dtype) for v in side] for side in interface(model)]
    return [*sides, sorted(v.name or "" for v in model.graph.inputs if v.name in model.graph.initializers)]


def _overrides(model: ir.Model, kinds: str) -> dict[str, NDArray[Any]]:
    """Other values for the initializers that a caller may override, those of some ``kinds`` of dtype."""
    found: dict[str, NDArray[Any]] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name in model.graph.initializers and value.const_value is not None:
            array = value.const_value.numpy()
            if array.dtype.kind in kinds:
                kind = array.dtype.kind
                found[name] = (array * _OVERRIDE if kind == "f" else ~array if kind == "b" else array + 1).astype(
                    array.dtype
                )
    return found


def _overridden(model: ir.Model, values: dict[str, NDArray[Any]]) -> ir.Model:
    changed = clone(model)
    for name, array in values.items():
        changed.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return changed


def outline(model: ir.Model) -> list[Any]:
    """The graph by names, attributes and the identity of its weights: cheap, and equal for an untouched clone."""
    found: list[Any] = []
    for graph in ir_graphs(model):
        found.append([[v.name for v in graph.inputs], [v.name for v in graph.outputs]])
        found.append({name: id(value.const_value) for name, value in graph.initializers.items()})
        for node in graph:
            given = node.attributes
            attributes = {name: _outline_of(attribute) for name, attribute in given.items()} if given else None
            names = [v.name if v is not None else None for v in (*node.inputs, *node.outputs)]
            found.append((node.domain, node.op_type, node.overload, names, attributes))
    return found


def _outline_of(attribute: ir.Attr) -> Any:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return None  # a clone has bodies of its own, which are graphs of the model too
    return id(attribute.value) if attribute.type == ir.AttributeType.TENSOR else attribute.value


def recipe_of(pass_: Pass, violation: Violation, **settings: Any) -> str:
    """A recipe that runs just this pass, from whatever folder, and says in a comment what is wrong with it."""
    use = getattr(pass_, "use", "")
    if ".py:" in use:
        pass_ = dataclasses.replace(pass_, use=str(Path(use).absolute()))  # type: ignore[type-var]
    why = " ".join(violation.reason.split())
    return f"# {why}\n{write(Recipe(passes=(pass_,), **settings))}"


def write_reproducer(before: ir.Model, pass_: Pass, violation: Violation, feeds: list[Feed], seed: int) -> Path | None:
    """A folder with the model before the guilty pass, a recipe that runs just it, and the inputs that show it first."""
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"graphopt-repro-{pass_.name}-"))
        save(before, folder / "before.onnx")
        settings = {"model": "before.onnx", "output": "after.onnx", "verify": "off", "seed": seed}
        (folder / "recipe.toml").write_text(recipe_of(pass_, violation, **settings), encoding="utf-8")
        shown = [*feeds[violation.feed : violation.feed + 1], *feeds[: violation.feed]][:2]
        for index, feed in enumerate(shown):
            arrays: dict[str, Any] = {k: v.astype(str) if v.dtype == object else v for k, v in feed.items()}
            np.savez(folder / f"feed_{index}.npz", **arrays)
    except Exception:  # the reproducer is a courtesy; failing to write it must not fail the run
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder
