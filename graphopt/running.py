"""``graphopt.run``: a recipe, or a lock, from its model to its output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.base import Pass, Repeat, flatten
from graphopt.errors import InputError
from graphopt.locking import Lock, read_lock, run_locked
from graphopt.pipeline import Result, make, merge_options
from graphopt.recipe import Recipe, read
from graphopt.search.speed import Promise

_MUST = ("prune", "sparsify", "compress-weights", "compute-fp16", "finetune")
"""What a recipe names them for: where they do nothing, nothing was done."""


def expected(passes: Sequence[Pass | Repeat], allow_slower: bool) -> tuple[list[str], Promise | None]:
    """What whoever lists these passes relies on: those that have to change something, and, where one of them quantizes,
    that nothing slower is handed over."""
    names = [step.name for step in flatten(passes)]
    quantizing = [name for name in names if name.startswith("quantize-")]
    must = [*quantizing[:1], *(name for name in _MUST if name in names)]
    return must, Promise(allow_slower) if quantizing else None


def run(
    recipe: str | Path | Recipe | None = None,
    *,
    locked: str | Path | Lock | None = None,
    allow_slower: bool = False,
    **options: Any,
) -> Result:
    """Do what a recipe says, its model and output included (written unless ``output`` is missing).

    Args:
        recipe: a TOML file or :class:`~graphopt.recipe.Recipe`.
        locked: instead of it, a lock: the result has the locked bytes.
        allow_slower: hand over what the recipe quantizes even where it is slower than its model on this machine.
        options: as of :func:`optimize`.

    Raises:
        InputError, NothingDone, GateFailed: as :func:`optimize` and :func:`quantize`; of a lock as
            :func:`graphopt.locking.run_locked`.
    """
    if (recipe is None) == (locked is None):
        raise InputError("give a recipe, or a lock with --locked FILE; one of them")
    if locked is not None:
        held = locked if isinstance(locked, Lock) else read_lock(locked)
        result = run_locked(held, **options)
        if held.recipe.output is not None:
            result.save(held.recipe.output, external=held.table.get("external-data"))
        return result
    assert recipe is not None
    given = read(recipe) if isinstance(recipe, (str, Path)) else recipe
    if given.model is None:
        raise InputError('the recipe names no model; add model = "path.onnx", or use graphopt optimize IN --recipe R')
    merged = merge_options(options, given)
    merged.settings = {"recipe": recipe}
    must, promise = expected(given.passes, allow_slower or given.allow_slower)
    result = make(given.model, given.passes, merged, verb="run", must=must, promise=promise)
    if given.output is not None:
        result.save(given.output)
    return result
