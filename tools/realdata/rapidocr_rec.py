"""Text lines for PP-OCR recognition; the label is the line as class indices of the CTC output."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .dataset import Array, Arrays, DataSet, FloatModel
from .text_images import LineStyle, fit_line, random_text, render_line

HEIGHT, WIDTH = 48, 320
_STYLE = LineStyle(min_size=12, max_rotation=2.0, max_blur=1.1, max_noise=22.0, min_contrast=60)
# No rendered text is longer; a fixed length keeps the label one array.
_MAX_LABEL = 32


def dictionary(model_path: Path) -> dict[str, int]:
    """Class index by character: blank is 0, the space comes after the characters of the metadata."""
    characters = FloatModel(model_path).metadata["character"].splitlines()
    index = {character: position + 1 for position, character in enumerate(characters)}
    return index | {" ": len(characters) + 1}


def encode(text: str, index: dict[str, int]) -> Array:
    """Class indices, padded with -1."""
    label = np.full(_MAX_LABEL, -1, dtype=np.int64)
    label[: len(text)] = [index[character] for character in text]
    return label


def _lines(count: int, seed: int, index: dict[str, int]) -> Arrays:
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        text = random_text(rng)
        images.append(fit_line(render_line(text, rng, _STYLE), HEIGHT, WIDTH))
        labels.append(encode(text, index))
    return {"x": np.stack(images), "target": np.stack(labels)}


def build(model_path: Path) -> DataSet:
    """32 calibration and 120 evaluation lines."""
    index = dictionary(model_path)
    return DataSet(_lines(32, 101, index), _lines(120, 102, index))
