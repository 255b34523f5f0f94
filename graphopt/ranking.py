"""``graphopt.sensitivity``: which layers hurt when they are quantized, and which to leave in float."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import InputError, NothingDone
from graphopt.manager import PassManager
from graphopt.model import ModelLike
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.pipeline import make_context, merge_options, read_source
from graphopt.presets import prepare
from graphopt.report.document import about, versions
from graphopt.search.sensitivity import LayerDamage
from graphopt.search.sensitivity import sensitivity as measure

SUGGESTED_SHARE = 0.9
"""The layers suggested for float are the fewest that make this share of the summed damage ..."""

_AT_MOST = 0.25  # ... but never more than this share of all layers: then no few layers are to blame


def sensitivity(model: ModelLike, *, observer: str = "mse", weights: str = "auto", **options: Any) -> dict[str, Any]:
    """Every layer's damage, worst first, and the few that do most of it.

    Args:
        model: anything :func:`graphopt.model.load` takes; never mutated.
        observer: as for :func:`graphopt.quantize`.
        weights: as for :func:`graphopt.quantize`.
        options: fields of :class:`graphopt.pipeline.Options`; ``data`` is needed.

    Raises:
        InputError: bad model, data or option.
        NothingDone: there is no layer to quantize.
    """
    merged = merge_options(options, None)
    loaded, source = read_source(model, merged)
    report: dict[str, Any] = {
        **versions("sensitivity", vars(merged)),
        "input": about(loaded, source),
        "data": None,
        "eval_data": None,
        "notes": [],
    }
    context = make_context(loaded, merged, report)
    prepared = PassManager(prepare(loaded, merged.target, calibrated=True), verify="off").run(loaded, context)
    report["notes"] += [f"{e.name} {e.reason}; reproducer: {e.reproducer}" for e in prepared.ledger if e.reproducer]
    damages = measure(prepared.model, QuantizeStatic(observer=observer, weights=weights), context)
    if not damages:
        raise NothingDone("there is no layer that could be quantized; graphopt quantize --dry-run says why")
    report["layers"] = [damage.as_dict() for damage in damages]
    report["suggested"] = [damage.layer for damage in suggested(damages)]
    return report


def suggested(damages: Sequence[LayerDamage]) -> list[LayerDamage]:
    """The fewest layers that do :data:`SUGGESTED_SHARE` of the damage, if they are few; else none."""
    total, found = sum(d.damage for d in damages), []
    done = 0.0
    for damage in damages:
        if total <= 0 or done >= SUGGESTED_SHARE * total:
            break
        found.append(damage)
        done += damage.damage
    return found if len(found) <= max(1, _AT_MOST * len(damages)) else []


def excluded_layers(path: str | Path) -> list[str]:
    """The layers that a file written by ``graphopt sensitivity --json`` suggests to leave in float.

    Raises:
        InputError: the file cannot be read or is another kind of file.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        names = report["suggested"]
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; make it with graphopt sensitivity IN --data D -o {path}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not what graphopt sensitivity -o writes ({type(error).__name__}); make it again"
        ) from error
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"'suggested' in {path} is no list of names; make the file again with graphopt sensitivity -o")
    return names
