"""Upright and upside-down text lines for the PP-OCR angle classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .dataset import Arrays, DataSet
from .text_images import LineStyle, fit_line, random_text, render_line

HEIGHT, WIDTH = 48, 192
_STYLE = LineStyle(min_size=13, max_rotation=3.0, max_blur=1.5, max_noise=28.0, min_contrast=50)


def _lines(count: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    images = []
    labels = np.arange(count, dtype=np.int64) % 2
    for turned in labels:
        image = render_line(random_text(rng), rng, _STYLE)
        if turned:
            image = image.transpose(Image.Transpose.ROTATE_180)
        images.append(fit_line(image, HEIGHT, WIDTH))
    return {"x": np.stack(images), "label": labels}


def build(model_path: Path) -> DataSet:
    """32 calibration and 120 evaluation lines, every second one turned by 180 degrees."""
    return DataSet(_lines(32, 201), _lines(120, 202))
