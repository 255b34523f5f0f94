"""Small pages with text lines at known places for PP-OCR detection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .dataset import Array, Arrays, DataSet
from .photos import PHOTOS, load_photo
from .text_images import add_noise, colours, font, normalise, random_text

SIDE = 320
# No page has more lines; a fixed number keeps the label one array.
_MAX_BOXES = 12
# PP-OCR was trained on boxes drawn loosely around the ink.
_MARGIN = 2


def _background(rng: np.random.Generator, paper: tuple[int, ...]) -> Image.Image:
    """Plain, shaded, or a faint photograph under the paper's colour."""
    plain = Image.new("RGB", (SIDE, SIDE), paper)
    kind = rng.integers(3)
    if kind == 0:
        return plain
    if kind == 1:
        ramp = np.linspace(-25, 25, SIDE) * rng.choice([-1, 1])
        shaded = np.asarray(plain, dtype=np.float64) + ramp[None, :, None]
        return Image.fromarray(np.clip(shaded, 0, 255).astype(np.uint8))
    photo = load_photo(PHOTOS[rng.integers(len(PHOTOS))]).resize((SIDE, SIDE))
    return Image.blend(plain, photo, float(rng.uniform(0.1, 0.35)))


def _page(rng: np.random.Generator) -> tuple[Array, Array]:
    """One page as the model wants it, and the boxes (x0, y0, x1, y1) of its lines."""
    ink, paper = colours(rng, 45)
    page = _background(rng, paper)
    draw = ImageDraw.Draw(page)
    boxes: list[tuple[float, float, float, float]] = []
    y = float(rng.integers(6, 30))
    while len(boxes) < _MAX_BOXES:
        face = font(rng, int(rng.integers(14, 30)))
        text = random_text(rng)
        left, top, right, bottom = face.getbbox(text)
        width, height = right - left, bottom - top
        if y + height > SIDE - 6:
            break
        if width < SIDE - 12:
            x = float(rng.integers(6, int(SIDE - 6 - width) + 1))
            draw.text((x - left, y - top), text, fill=ink, font=face)
            boxes.append((x - _MARGIN, y - _MARGIN, x + width + _MARGIN, y + height + _MARGIN))
        y += height + float(rng.integers(10, 34))
    page = page.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))
    page = add_noise(page, rng, float(rng.uniform(0, 24)))
    label = np.full((_MAX_BOXES, 4), -1, dtype=np.float32)
    label[: len(boxes)] = boxes
    return normalise(page), label


def _pages(count: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    pages = [_page(rng) for _ in range(count)]
    return {"x": np.stack([page for page, _ in pages]), "boxes": np.stack([boxes for _, boxes in pages])}


def build(model_path: Path) -> DataSet:
    """32 calibration and 64 evaluation pages."""
    return DataSet(_pages(32, 301), _pages(64, 302))
