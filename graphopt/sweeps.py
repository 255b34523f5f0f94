"""The sweeps a pass may ask for, over the calibration data: what :class:`~graphopt.base.Context` calls."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt import data as data_module
from graphopt.base import Context
from graphopt.errors import RuntimeFailure
from graphopt.gram import Seen, collect_inputs, each_input, sample_inputs
from graphopt.model import interface
from graphopt.session import fused_readers
from graphopt.statistics import Statistics, channel_means, collect
from graphopt.taps import TAP_CHUNK_BYTES
from graphopt.traversal import ir_graphs

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.data import Dataset
    from graphopt.linear import Form
    from graphopt.model import ValueSpec

_GRAM_SAMPLES = 64  # calibration samples that second moments are taken over
_HELD = 512  # held-out inputs per layer that a decision is confirmed on
_MEAN_SAMPLES = 32  # calibration samples that the means per channel are taken over: means settle fast


@dataclass
class Feeds:
    """A data set as re-iterable feeds."""

    dataset: Dataset
    inputs: Sequence[ValueSpec]

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        for index, sample in enumerate(self.dataset):
            yield data_module.feeds(sample, self.inputs, name=self.dataset.sample_name(index))


def attach(context: Context) -> None:
    """Give ``context`` its sweeps, each over ``context.data`` as it is when asked; what was seen of a model is
    remembered until another one is asked about, so that every way of quantizing it costs one sweep together."""

    def feeds(model: ir.Model, dataset: Dataset | None) -> Feeds:
        assert dataset is not None
        return Feeds(dataset, interface(model)[0])

    def sweep(model: ir.Model, names: Sequence[str], histograms: bool) -> Statistics:
        assert context.data is not None
        total = len(context.data)
        return collect(
            model,
            names,
            feeds(model, context.data),
            histograms=histograms,
            threads=context.threads,
            progress=lambda done: context.progress(done, total, "calibrating"),
        )

    def means(model: ir.Model, axes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
        assert context.data is not None
        return channel_means(model, axes, feeds(model, context.data.take(_MEAN_SAMPLES)), threads=context.threads)

    def layer_inputs(model: ir.Model, forms: Sequence[Form]) -> dict[Form, Seen]:
        assert context.data is not None
        fitted, held = hold_back(context.data.take(_GRAM_SAMPLES), interface(model)[0])
        threads = context.threads
        moments = collect_inputs(
            model, forms, feeds(model, fitted), samples=len(fitted), threads=threads, scratch=context.scratch
        )
        rest = sample_inputs(model, list(moments), feeds(model, held), most=_HELD, samples=len(held), threads=threads)
        return {form: Seen(seen, rest[form]) for form, seen in moments.items() if form in rest}

    def layer_rows(
        model: ir.Model, forms: Sequence[Form], rows: Callable[[Form, int], int], held: bool
    ) -> Iterator[tuple[Form, NDArray[np.float32]]]:
        assert context.data is not None
        parts = hold_back(context.data.take(_GRAM_SAMPLES), interface(model)[0])
        chosen = feeds(model, parts[held])
        first = next(iter(chosen))
        yield from each_input(
            model, forms, chosen, first, lambda f: rows(f, len(parts[held])), TAP_CHUNK_BYTES, context.threads
        )

    def held_out(model: ir.Model) -> Iterator[dict[str, NDArray[Any]]]:
        assert context.data is not None
        inputs = interface(model)[0]
        yield from Feeds(hold_back(context.data.take(_GRAM_SAMPLES), inputs)[1], inputs)

    seen = _Remembered(context, sweep, means, layer_inputs)
    context.collect = seen.collect
    context.channel_means = seen.channel_means
    context.layer_inputs = seen.layer_inputs
    context.fused_readers = seen.fused_readers
    context.held_out = held_out
    context.layer_rows = layer_rows


@dataclass
class _Remembered:
    """The sweeps of one model at a time. What a search asks again, for a copy that shares its weights, is known."""

    context: Context
    sweep: Callable[[ir.Model, Sequence[str], bool], Statistics]
    means: Callable[[ir.Model, Mapping[str, int]], dict[str, NDArray[np.float64]]]
    inputs: Callable[[ir.Model, Sequence[Form]], dict[Form, Seen]]
    _model: tuple[Any, ...] = ()
    _statistics: dict[bool, Statistics] = field(default_factory=dict)
    _means: dict[tuple[str, int], NDArray[np.float64]] = field(default_factory=dict)
    _inputs: dict[Form, Seen | None] = field(default_factory=dict)
    _readers: Mapping[str, int] | None = None

    def _of(self, model: ir.Model) -> None:
        """Forget everything, unless it was seen of ``model``. A clone shares its tensors, and a copy held here keeps
        their addresses from being used again."""
        mine = (_Same(self.context.data), *_traits(model))
        if mine != self._model:
            self._model = mine
            self._statistics, self._means, self._inputs, self._readers = {}, {}, {}, None

    def collect(self, model: ir.Model, names: Sequence[str], histograms: bool) -> Statistics:
        """As :attr:`Context.collect`."""
        self._of(model)
        known = self._statistics.get(histograms)
        missing = [name for name in dict.fromkeys(names) if known is None or name not in known.values]
        if missing or known is None:
            found = self.sweep(model, missing, histograms)
            self._statistics[histograms] = found if known is None else _joined(known, found)
        return self._statistics[histograms]

    def channel_means(self, model: ir.Model, axes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
        """As :attr:`Context.channel_means`."""
        self._of(model)
        missing = {name: axis for name, axis in axes.items() if (name, axis) not in self._means}
        if missing:
            self._means |= {(name, missing[name]): mean for name, mean in self.means(model, missing).items()}
        return {name: self._means[name, axis] for name, axis in axes.items() if (name, axis) in self._means}

    def fused_readers(self, model: ir.Model) -> Mapping[str, int]:
        """As :attr:`Context.fused_readers`."""
        self._of(model)
        if self._readers is None:
            try:
                self._readers = fused_readers(model)
            except RuntimeFailure:
                self._readers = {}
        return self._readers

    def layer_inputs(self, model: ir.Model, forms: Sequence[Form]) -> dict[Form, Seen]:
        """As :attr:`Context.layer_inputs`."""
        self._of(model)
        missing = [form for form in dict.fromkeys(forms) if form not in self._inputs]
        if missing:
            found = self.inputs(model, missing)
            self._inputs |= {form: found.get(form) for form in missing}
        return {form: seen for form in forms if (seen := self._inputs[form]) is not None}


def _joined(known: Statistics, more: Statistics) -> Statistics:
    """Other values of the same model, seen on the same samples."""
    return Statistics({**known.values, **more.values}, known.samples, known.runs + more.runs)


@dataclass(frozen=True)
class _Same:
    """A tensor that equals itself alone: comparing the bytes of all weights would cost more than it saves."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _traits(model: ir.Model) -> tuple[Any, ...]:
    """Equal for models that compute the same values under the same names, from the same tensors."""
    found: list[Any] = []
    for graph in ir_graphs(model):
        found.append(tuple(value.name for value in graph.inputs))
        found += [(name, _Same(value.const_value)) for name, value in graph.initializers.items()]
        for node in graph:
            names = [*(v.name if v is not None else "" for v in node.inputs), *(v.name for v in node.outputs)]
            found.append((node.domain, node.op_type, *names))
            found += [(key, _attribute(attribute)) for key, attribute in node.attributes.items()]
    return tuple(found)


def _attribute(attribute: ir.Attr) -> Any:
    import onnx_ir as ir

    if attribute.type == ir.AttributeType.TENSOR:
        return _Same(attribute.value)
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)  # their nodes are compared themselves
    return None if attribute.type in graphs else repr(attribute.value)


def hold_back(dataset: Dataset, inputs: Sequence[ValueSpec]) -> tuple[Dataset, Dataset]:
    """(three quarters to fit on, one quarter to confirm on); by content, so that the order changes nothing. One sample
    alone is both."""
    if len(dataset) < 2:
        return dataset, dataset
    marks = [zlib.crc32(b"".join(a.tobytes() for a in feed.values())) for feed in Feeds(dataset, inputs)]
    order = sorted(range(len(marks)), key=lambda index: marks[index])
    held = max(len(order) // 4, 1)
    return dataset.subset(sorted(order[held:])), dataset.subset(sorted(order[:held]))
