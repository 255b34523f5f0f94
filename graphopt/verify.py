"""Holding exact passes to "exact": the same outputs within the model's own noise, on more than one kind of input."""

from __future__ import annotations

import contextlib
import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.base import Context, Pass, Repeat
from graphopt.data import feeds as to_feeds
from graphopt.errors import DataError, RuntimeFailure
from graphopt.model import fingerprint, interface
from graphopt.session import Session
from graphopt.storage import save
from graphopt.validation import compare_sessions, exact_violation, output_noise, random_feeds

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

REAL_SAMPLES = 4


class Verifier:
    """Compares candidates with one reference model; the reference's sessions and noise are made once.

    Feeds: the first real samples where there is data, else legal random ones; plus random ones at a second batch size
    where the reference runs at it. ``unable`` says why no comparison is possible (custom operators, say).
    """

    def __init__(self, reference: ir.Model, context: Context) -> None:
        self.unable: str | None = None
        self.threads = context.threads
        self.feeds: list[dict[str, NDArray[Any]]] = []
        try:
            self.session = Session(reference, optimize=False, threads=context.threads)
            self.feeds, self.description = self._choose(reference, context)
            self.noise = output_noise(reference, self.feeds, threads=context.threads)
        except RuntimeFailure as error:
            self.unable = str(error)
            return
        _, outputs = interface(reference)
        self.floating = {o.name: o.dtype is not None and np.dtype(o.dtype).kind not in "iub" for o in outputs}
        self.interface = interface(reference)

    def _choose(self, model: ir.Model, context: Context) -> tuple[list[dict[str, NDArray[Any]]], str]:
        inputs, _ = interface(model)
        if context.data is not None:
            real = [to_feeds(sample, inputs) for sample in islice(context.data, REAL_SAMPLES)]
            chosen, text = real, f"{len(real)} real samples"
        else:
            chosen = random_feeds(model, 2, seed=context.seed)
            text = f"{len(chosen)} random inputs"
        usable = [feed for feed in chosen if self._runs(feed)]
        if not usable:
            raise RuntimeFailure(self._why(chosen[0]) if chosen else "there is no input to run it on")
        second = []
        with contextlib.suppress(DataError):  # an input that cannot be drawn: real samples have to do
            second = [f for f in random_feeds(model, 1, seed=context.seed + 1, batch=3) if self._runs(f)]
        if second and any(f[k].shape != usable[0][k].shape for f in second for k in f):
            return usable + second, text + " and at a second batch size"
        return usable, text

    def _runs(self, feed: dict[str, NDArray[Any]]) -> bool:
        try:
            self.session.run(feed)
        except RuntimeFailure:
            return False
        return True

    def _why(self, feed: dict[str, NDArray[Any]]) -> str:
        try:
            self.session.run(feed)
        except RuntimeFailure as error:
            return str(error)
        return "it runs after all"

    def violation(self, candidate: ir.Model) -> str | None:
        """Why ``candidate`` is no exact rewrite of the reference, or None; optimizations off and on."""
        if [(v.name, v.dtype) for side in interface(candidate) for v in side] != [
            (v.name, v.dtype) for side in self.interface for v in side
        ]:
            return "inputs or outputs have other names or types"
        try:
            for optimize in (False, True):
                session = Session(candidate, optimize=optimize, threads=self.threads)
                comparison = compare_sessions(self.session, session, self.feeds)
                found = exact_violation(comparison, self.noise, self.floating)
                if found is not None:
                    return found
        except RuntimeFailure as error:
            return str(error)
        return None


def write_reproducer(before: ir.Model, pass_: Pass, violation: str, verifier: Verifier) -> Path | None:
    """A folder with the model before the guilty pass, a recipe that runs just it, and the inputs that show it."""
    from graphopt.recipe import Recipe, write

    folder = Path(tempfile.gettempdir()) / f"graphopt-repro-{pass_.name}-{fingerprint(before)[:12]}"
    try:
        folder.mkdir(exist_ok=True)
        save(before, folder / "before.onnx")
        steps: tuple[Pass | Repeat, ...] = (pass_,)
        text = write(Recipe(passes=steps, model="before.onnx", output="after.onnx", verify="off"))
        (folder / "recipe.toml").write_text(f"# {violation}\n{text}", encoding="utf-8")
        for index, feed in enumerate(verifier.feeds[:2]):
            arrays: dict[str, Any] = {k: v for k, v in feed.items() if v.dtype != object}
            np.savez(folder / f"feed_{index}.npz", **arrays)
    except Exception:  # the reproducer is a courtesy; failing to write it must not fail the run
        return None
    return folder
