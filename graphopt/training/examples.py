"""Samples with what the teacher says of them, in memory, and batches of those that fit together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt import data as data_module
from graphopt.errors import DataError, InputError
from graphopt.training.losses import LABEL, TEACHER, Objective, label_of, one_hot

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphopt.data import Dataset
    from graphopt.model import ValueSpec

Feeds = dict[str, "NDArray[Any]"]

MEMORY = 2 << 30
"""Bytes that samples and teacher outputs may take together; what goes beyond is not trained on."""


@dataclass
class Examples:
    """``feeds[i]``: student inputs, teacher values and labels of sample i. ``batched``: samples may be stacked along
    the first axis. ``left_out``: how many did not fit in memory."""

    feeds: list[Feeds]
    inputs: Sequence[ValueSpec]
    batched: bool = False
    left_out: int = 0
    groups: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        found: dict[Any, list[int]] = defaultdict(list)
        for index, feed in enumerate(self.feeds):
            found[signature(feed)].append(index)
        self.groups = list(found.values())

    def __len__(self) -> int:
        return len(self.feeds)

    def stacked(self, indices: Sequence[int]) -> Feeds:
        """These samples (of one group) as one batch."""
        first = self.feeds[indices[0]]
        if len(indices) == 1:
            return first
        return {
            name: value if value.ndim == 0 else np.concatenate([self.feeds[i][name] for i in indices])
            for name, value in first.items()
        }

    def draw(self, count: int, rng: np.random.Generator) -> list[Feeds]:
        """A batch of ``count`` samples of one group (each sample equally likely), as runs to be averaged."""
        sizes = np.asarray([len(group) for group in self.groups], np.float64)
        group = self.groups[int(rng.choice(len(sizes), p=sizes / sizes.sum()))]
        picked = rng.choice(group, min(count, len(group)), replace=False).tolist()
        return [self.stacked(picked)] if self.batched else [self.feeds[i] for i in picked]

    def all(self, count: int) -> list[tuple[Feeds, int]]:
        """Every sample once, in batches of at most ``count``: (batch, samples in it)."""
        found = []
        for group in self.groups:
            size = count if self.batched else 1
            for start in range(0, len(group), size):
                part = group[start : start + size]
                found.append((self.stacked(part), len(part)))
        return found


def signature(feed: Feeds) -> tuple[Any, ...]:
    """What one gradient graph is for: shapes, and the values of single integers."""
    fixed = [(n, v.item()) for n, v in feed.items() if v.dtype.kind in "iub" and v.size == 1 and v.ndim < 2]
    return tuple(sorted((n, v.shape) for n, v in feed.items())), tuple(sorted(fixed))


def gather(
    dataset: Dataset,
    inputs: Sequence[ValueSpec],
    teach: Callable[[dict[str, Any]], Feeds],
    objective: Objective,
    classes: int | None,
    told: Callable[[int], None],
) -> Examples:
    """Run the teacher over the samples. ``teach``: sample -> its values by name; ``classes``: of the student's first
    output, for labels.

    Raises:
        InputError: a label is missing or is none.
    """
    feeds: list[Feeds] = []
    used = 0
    for index, sample in enumerate(dataset):
        name = dataset.sample_name(index)
        feed = data_module.feeds(sample, inputs, name=name)
        feed |= {TEACHER + key: value for key, value in teach(sample).items()}
        if objective.labelled:
            label = label_of(sample)
            if label is None:
                raise InputError(f"the loss cross-entropy needs labels and sample '{name}' has none; add a key 'label'")
            feed[LABEL] = one_hot(label, classes or 0)
        for key in objective.label_inputs():
            if key not in sample:
                raise DataError(
                    f"the loss reads '{key}' and sample '{name}' has no such key; add it, or rename the input"
                )
            feed[LABEL + key] = np.asarray(sample[key])
        used += sum(value.nbytes for value in feed.values())
        if used > MEMORY and feeds:
            return Examples(feeds, inputs, left_out=len(dataset) - len(feeds))
        feeds.append(feed)
        told(index + 1)
    return Examples(feeds, inputs)


def stackable(examples: Examples) -> bool:
    """Whether samples may become batches as far as can be told from shapes: the first axis is free in every input, and
    each sample is one along it."""
    for spec in examples.inputs:
        shape = spec.shape
        if shape == () and all(f[spec.name].dtype.kind in "iub" for f in examples.feeds):
            continue  # fixed: part of the signature
        if not shape or isinstance(shape[0], int):
            return False
    first = examples.feeds[0]
    return all(value.ndim == 0 or value.shape[0] == 1 for value in first.values())
