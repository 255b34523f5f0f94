"""``graphopt.bisect``: which pass goes wrong, at which rewrite, at which value first, shown on the smallest piece."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.base import Context, Pipeline, flatten
from graphopt.errors import InputError, NothingDone, command
from graphopt.ledger import Guilt, LedgerEntry, forget_reproducers
from graphopt.manager import PassManager
from graphopt.model import ModelLike, to_proto
from graphopt.pipeline import Options, make_context, merge_options, read_source
from graphopt.presets import exact_passes
from graphopt.recipe import Recipe, chosen
from graphopt.remote import is_address
from graphopt.report.document import about, versions
from graphopt.search.minimal import Piece, Suspect, first_divergence, smallest
from graphopt.storage import save, write_bytes, write_text
from graphopt.verify import recipe_of

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray


@dataclass
class Bisection:
    """What :func:`bisect` found. ``report`` is the object that ``--json`` prints; its ``guilty`` is empty where nothing
    diverges."""

    report: dict[str, Any]
    piece: Piece | None = None
    guilt: Guilt | None = None

    @property
    def model(self) -> onnx.ModelProto | None:
        """The smallest piece on which the first guilty pass still goes wrong."""
        return None if self.piece is None else to_proto(self.piece.model)

    @property
    def feed(self) -> Mapping[str, NDArray[Any]] | None:
        """The inputs of that piece that show it; None: nothing diverges, or no inputs are needed."""
        return None if self.piece is None else self.piece.feed

    def save(self, path: str | Path) -> list[Path]:
        """Write the piece to ``path``, its inputs beside it (``.npz``) and a recipe (``.toml``) that runs the pass on
        them, and enter them in the report; nothing where nothing diverges.

        Raises:
            InputError: it cannot be written there.
        """
        if self.piece is None or self.guilt is None:
            return []
        if is_address(path):
            raise InputError(f"-o {path}: a model, its inputs and a recipe are written beside each other; name a file")
        target = Path(path)
        data, recipe = target.with_suffix(".npz"), target.with_suffix(".toml")
        if target in (data, recipe):
            raise InputError(f"-o {path}: inputs and a recipe of that name are written beside it; name it repro.onnx")
        settings: dict[str, Any] = {"model": target.name, "seed": self.report["options"]["seed"]}
        written = save(self.piece.model, target)
        repro = self.report["repro"]
        if self.piece.feed is not None:
            # One sample: an axis more than the input has.
            arrays = {k: v[None].astype(str) if v.dtype == object else v[None] for k, v in self.piece.feed.items()}
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            write_bytes(data, buffer.getvalue())
            settings["data"], repro["data"] = data.name, str(data)
            written.append(data)
        write_text(recipe, recipe_of(self.guilt.pass_, self.piece.violation, **settings))
        repro["path"], repro["recipe"] = str(target), str(recipe)
        repro["command"] = command("graphopt", "bisect", target, "--recipe", recipe)
        return [*written, recipe]


def bisect(
    model: ModelLike, *, recipe: str | Path | Recipe | None = None, passes: Sequence[Any] | None = None, **options: Any
) -> Bisection:
    """Run exact passes, find the one that changes what the model computes, and shrink the evidence.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        recipe: a TOML file or :class:`~graphopt.recipe.Recipe`; its settings give way to ``options``.
        passes: pass names, ``file.py:function``, :class:`~graphopt.base.Pass` objects or foreign callables, instead.
        options: fields of :class:`graphopt.pipeline.Options`; ``data`` are samples to look on besides made-up ones.

    Raises:
        InputError: bad model, data, recipe or option; no exact pass among those given.
        NothingDone: the model does not run here, so nothing can be compared.
    """
    given, pipeline = chosen(recipe, passes, exact_passes)
    merged = merge_options(options, given)
    merged.settings = {"recipe": recipe}
    _check(merged, pipeline)
    loaded, source = read_source(model, merged)
    report: dict[str, Any] = {
        **versions("bisect", vars(merged)),
        "input": about(loaded, source),
        "data": None,
        "passes": 0,
        "guilty": [],
        "value": None,
        "repro": None,
        "notes": [],
        "exit_code": 0,
        "error": None,
    }
    merged.eval_data = merged.data  # nothing has to be held back
    context = make_context(loaded, merged, report)
    report["data"] = report.pop("eval_data", None)
    context.progress(0, None, "running the passes")
    result = PassManager(pipeline, verify=merged.verify).run(loaded, context)
    forget_reproducers(result.ledger)  # what -o writes is smaller, and only that is told of
    report["notes"] += result.notes
    report["passes"] = len(result.ledger)
    found = [(i, e, e.guilt) for i, e in enumerate(result.ledger, 1) if e.guilt is not None]
    unable = next((n for n in result.notes if n.startswith("not compared numerically")), None)
    if not found and unable is not None:
        raise NothingDone(f"{unable}; nothing could be bisected")
    report["guilty"] = [_guilty(index, entry, guilt) for index, entry, guilt in found]
    if not found:
        return Bisection(report)
    context.progress(0, None, "looking for the smallest piece")
    return _look_into(found[0][2], context, report)


def _check(options: Options, pipeline: Pipeline) -> None:
    if not any(pass_.contract == "exact" for pass_ in flatten(pipeline)):
        raise InputError(
            "there is no exact pass to bisect: what approximates is judged by gates; for its damage layer by layer use "
            "graphopt compare A B --layerwise, or graphopt sensitivity"
        )
    if options.samples is not None and options.data is None:
        raise InputError("--samples says how much of the data to use, and there is none; give --data")
    if options.verify == "off":
        raise InputError("verify is 'off', and bisecting is verifying; leave it out")


def _look_into(guilt: Guilt, context: Context, report: dict[str, Any]) -> Bisection:
    """The first diverging value of one guilty pass, and the smallest piece."""
    suspect = Suspect(guilt, context)
    report["value"] = first_divergence(suspect, guilt.feed) if guilt.feed is not None else None
    piece = smallest(suspect, report["value"]["value"] if report["value"] else None)
    report["repro"] = {
        **dict.fromkeys(("path", "data", "recipe", "command")),
        "nodes": sum(1 for _ in piece.model.graph),
        "of": sum(1 for _ in guilt.before.graph),
        "reason": piece.violation.reason,
    }
    report["exit_code"] = 1
    return Bisection(report, piece, guilt)


def _guilty(index: int, entry: LedgerEntry, guilt: Guilt) -> dict[str, Any]:
    return {
        "pass": entry.name,
        "options": entry.options,
        "step": index,
        "sites": list(guilt.sites),
        "rewrites": len(guilt.rewrites),
        "reason": guilt.violation.reason,
    }
