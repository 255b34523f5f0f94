"""The sweeps a pass may ask for, over the calibration data: what :class:`~graphopt.base.Context` calls."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt import data as data_module
from graphopt.base import Context
from graphopt.gram import Seen, collect_inputs, each_input, sample_inputs
from graphopt.model import interface
from graphopt.session import TAP_CHUNK_BYTES
from graphopt.statistics import Statistics, channel_means, collect

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
    """Give ``context`` its sweeps, each over ``context.data`` as it is when asked."""

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

    context.collect = sweep
    context.held_out = held_out
    context.layer_rows = layer_rows
    context.channel_means = means
    context.layer_inputs = layer_inputs


def hold_back(dataset: Dataset, inputs: Sequence[ValueSpec]) -> tuple[Dataset, Dataset]:
    """(three quarters to fit on, one quarter to confirm on); by content, so that the order changes nothing. One sample
    alone is both."""
    if len(dataset) < 2:
        return dataset, dataset
    marks = [zlib.crc32(b"".join(a.tobytes() for a in feed.values())) for feed in Feeds(dataset, inputs)]
    order = sorted(range(len(marks)), key=lambda index: marks[index])
    held = max(len(order) // 4, 1)
    return dataset.subset(sorted(order[held:])), dataset.subset(sorted(order[:held]))
