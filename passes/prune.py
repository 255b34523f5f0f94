"""Structured pruning: channels, heads and hidden units leave the weights, and the layers behind them are refitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.channels import ONLY, Channels, find_channels
from graphopt.concrete_shapes import two_sizes
from graphopt.errors import PreconditionError, RuntimeFailure, did_you_mean
from graphopt.gates import parse_drop
from graphopt.graph import label
from graphopt.model import clone, interface
from graphopt.passes._amplification import amplifications
from graphopt.passes._patterns import check_patterns, matches
from graphopt.passes._refit import REPAIRS, plan_layers, refit
from graphopt.passes._saliency import IMPORTANCES, by_loss, by_magnitude, layer_forms, layers_read
from graphopt.passes._shrink import Shrinker
from graphopt.passes._units import AMOUNTS, Ledger, Path, choose
from graphopt.profiling import profile
from graphopt.session import Session
from graphopt.validation import runnable_feeds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_KEYS = {"macs": "macs", "size": "weight_bytes", "channels": "channels", "latency": "seconds"}

_PROFILED = 1.0  # seconds
_FED = 4  # samples that it is profiled on


@dataclass(frozen=True)
class Prune(Pass):
    """Remove the channels, attention heads and hidden units whose loss costs least, wherever they can be told apart.

    ``left``: the share of ``of`` that is left: ``macs`` (multiply-accumulates), ``size`` (bytes of weights),
    ``channels`` (those that can go) or ``latency`` (what the runtime's profile says that nodes take here; what the
    whole then takes is measured where time allows). ``importance``: ``loss`` (what is lost when the layers
    that read a channel make up for it; needs calibration data), ``l2`` or ``l1`` (size of the weights). ``repair``: how
    layers behind are refitted: ``asymmetric`` (on what they read in the pruned model, in order), ``symmetric`` (on what
    they read in the original), ``auto`` (the better of these two), ``moments`` (mean and spread of each output only) or
    ``none``. ``multiple``: channels that are left come in multiples of it, as kernels like them. ``exclude`` and
    ``include``: layers whose output channels stay, or may go: names, globs, ``re:`` expressions or operator types.
    ``search``: the amount is the most that goes, and less does where ``max-drop`` or ``min-sqnr`` would fail.
    ``max_drop``, ``min_sqnr``: a budget of this pass alone, in a recipe with others, which it searches in, too.
    """

    left: float = 0.7
    of: str = "macs"
    importance: str = "loss"
    repair: str = "auto"
    multiple: int = 8
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    search: bool = False
    max_drop: str | float = ""
    min_sqnr: float = 0.0
    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
        if not 0 < self.left < 1:
            raise ValueError(f"left is {self.left:g}; it must lie between 0 and 1 (0.7: seven tenths)")
        choices = (("of", AMOUNTS), ("importance", IMPORTANCES), ("repair", REPAIRS))
        for name, known in choices:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is '{value}'; " + did_you_mean(value, known, f"one of {', '.join(known)}"))
        if self.max_drop != "":
            parse_drop(str(self.max_drop), 1.0)
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}; it must be 1 or more")

    def check(self, model: ir.Model) -> None:
        """Functions hide layers."""
        if model.functions:
            raise PreconditionError("prune does not look into functions; run inline-functions first")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        gone = self.unmatched(model, context)
        needs = "data" if self.importance == "loss" or self.repair != "none" else None
        if needs and (context.data is None or context.layer_inputs is None):
            raise PreconditionError(
                "prune weighs and repairs on samples and there are none; give --data FILE (no labels needed), "
                "or --importance l2 --repair none"
            )
        channels = self.find(model, context)
        result = PassResult(skipped=gone + left_alone(channels))
        if not any(group.free for group in channels.groups):
            if not result.skipped:
                result.skipped.append(Skip("(graph)", "it has no two layers of which one reads what the other makes"))
            return result
        seconds = self.seconds(model, context)
        keep = choose(channels, self.paths(model, channels, context), self.of, self.left, self.multiple, seconds)
        if keep.all():
            result.skipped.append(
                Skip("(graph)", f"no group has {self.multiple} channels to spare; try --multiple 1 or a smaller rest")
            )
            return result
        result.changes = _changes(channels, keep)
        result.metrics = totals(channels, keep, seconds)
        reached = result.metrics[f"{_KEYS[self.of]}_left"]
        if reached is not None and reached > self.left + 1e-9:
            what = f"{100 * reached:.0f} % of the {self.of} are left, not {100 * self.left:.0f} %"
            result.skipped.append(Skip("(graph)", f"{what}: no more can go in multiples of {self.multiple}"))
        original = clone(model)
        layers = plan_layers(model, channels, keep)
        Shrinker(model, channels, keep).run()
        if self.repair != "none":
            report = refit(original, model, layers, context, self.repair, _progress(context))
            result.metrics |= report
        return result

    def unmatched(self, model: ir.Model, context: Context) -> list[Skip]:
        """Patterns whose nodes are gone."""
        gone = check_patterns(model, context.original, self.exclude, "exclude")
        return gone + check_patterns(model, context.original, self.include, "include")

    def find(self, model: ir.Model, context: Context) -> Channels:
        """Units and groups of ``model``, at the sizes of a sample (or of legal random inputs)."""
        return find_channels(
            model, two_sizes(model, _feeds(model, context, 1)[0], threads=context.threads), stays=self._stays
        )

    def seconds(self, model: ir.Model, context: Context) -> dict[str, float] | None:
        """What each node takes here, by its label, where that is what counts."""
        if self.of != "latency":
            return None
        context.progress(0, None, "profiling")
        feeds = _feeds(model, context, _FED)
        found, _ = profile(model, feeds, threads=context.threads or 1, seconds=_PROFILED)
        return {one.node or "": one.seconds for one in found}

    def _stays(self, node: ir.Node) -> str | None:
        if self.exclude and matches(node, self.exclude):
            return "excluded"
        return "not included" if self.include and not matches(node, self.include) else None

    def paths(self, model: ir.Model, channels: Channels, context: Context) -> list[Path]:
        """The order in which each group's units go."""
        if self.importance != "loss":
            return by_magnitude(channels, 1 if self.importance == "l1" else 2)
        assert context.layer_inputs is not None
        context.progress(0, None, "weighing channels")
        seen = context.layer_inputs(model, layer_forms(channels))
        memo = next(iter(seen.values())).memo if seen else {}
        key = ("prune", self.exclude, self.include)
        if key not in memo:  # a search for how much goes asks again, for copies of the same model
            found = by_loss(channels, seen, amplifications(model, layers_read(channels), seen, context))
            memo[key] = [(path.order, path.loss) for path in found]
        free = [group for group in channels.groups if group.free]
        return [Path(group, order, loss) for group, (order, loss) in zip(free, memo[key], strict=True)]


def _progress(context: Context) -> Callable[[int, int], None]:
    return lambda done, total: context.progress(done, total, "repairing layers")


def _feeds(model: ir.Model, context: Context, count: int) -> list[dict[str, Any]]:
    from graphopt.data import feeds

    if context.data is None:
        return runnable_feeds(model, Session(model, threads=context.threads), 1, seed=context.seed)
    inputs, _ = interface(model)
    return [feeds(sample, inputs) for sample in context.data.take(count)]


def left_alone(channels: Channels) -> list[Skip]:
    """Groups of which nothing can go, and why."""
    stuck = [(group.name, group.reason) for group in channels.groups if not group.free]
    for product in channels.products:
        reason = channels.trace.atoms.reason(product.made)
        if reason is not None and len(product.made) > 1:
            stuck.append((label(product.node), reason))
    return [Skip(name, f"its channels stay: {reason}") for name, reason in stuck]


def _changes(channels: Channels, keep: NDArray[np.bool_]) -> list[Change]:
    found = []
    for group in channels.groups:
        left = int(keep[group.units].sum())
        if left < len(group.units):
            names = ", ".join(label(node) for node in group.layers[1:4])
            more = f" (with {names}{', ...' if len(group.layers) > 4 else ''})" if names else ""
            found.append(Change("prune", group.name, f"{len(group.units)} -> {left} channels{more}"))
    return found


def totals(channels: Channels, keep: NDArray[np.bool_], seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Shares that are left, counted exactly; of the time, as the profile has it (None: nobody looked)."""
    ledger = Ledger(channels, seconds)
    macs, stored, spent = (ledger.total(what) for what in ("macs", "bytes", "seconds"))
    ledger.take(ledger.lost([int(u) for u in (~keep).nonzero()[0]]))
    units = [int(u) for group in channels.groups for u in group.units]
    free = sum(group.free for group in channels.groups)
    return {
        "macs_left": ledger.total("macs") / macs if macs else None,
        "weight_bytes_left": ledger.total("bytes") / stored if stored else None,
        "channels_left": 1 - float((~keep).sum()) / free if free else None,
        "seconds_left": ledger.total("seconds") / spent if spent else None,
        "units_removed": int((~keep).sum()),
        "units": len(units),
        "groups": len(channels.groups),
        "groups_free": sum(1 for group in channels.groups if group.free),
    }


def table(channels: Channels) -> list[dict[str, Any]]:
    """One row per group: who is in it, how many of its units may go, what they are worth."""
    ledger = Ledger(channels)
    macs, stored = ledger.total("macs"), ledger.total("bytes")
    rows = []
    for group in channels.groups:
        gone = ledger.lost(group.units[: group.free].tolist())
        rows.append(
            {
                "name": group.name,
                "layers": [label(node) for node in group.layers],
                "channels": len(group.units),
                "free": group.free,
                "macs_share": ledger.saved(gone, "macs") / macs if macs else 0.0,
                "bytes_share": ledger.saved(gone, "bytes") / stored if stored else 0.0,
                "reason": group.reason if group.reason != ONLY else f"{ONLY}: its only channel",
            }
        )
    return rows


__all__ = ["Prune", "RuntimeFailure", "table"]
