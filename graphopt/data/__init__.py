"""Every calibration and evaluation data format -> a re-iterable, lazy :class:`Dataset` of samples."""

from graphopt.data.check import (
    DataSummary,
    InputSummary,
    SkippedSample,
    feeds,
    labels,
    summarize,
)
from graphopt.data.dataset import Dataset, Sample, split
from graphopt.data.images import ImageOptions
from graphopt.data.load import load_data
from graphopt.data.synthetic import legal_random

__all__ = [
    "DataSummary",
    "Dataset",
    "ImageOptions",
    "InputSummary",
    "Sample",
    "SkippedSample",
    "feeds",
    "labels",
    "legal_random",
    "load_data",
    "split",
    "summarize",
]
