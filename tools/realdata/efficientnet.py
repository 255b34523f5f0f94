"""Crops of real photographs for EfficientNet-Lite0; the label is the float model's own class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .dataset import Array, Arrays, DataSet, FloatModel
from .photos import OBJECTS, load_photo

SIDE = 224


def preprocess(image: Image.Image) -> Array:
    """[3, 224, 224] RGB, (x - 127) / 128, as the lite variants were trained."""
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(((pixels - np.float32(127)) / np.float32(128)).transpose(2, 0, 1))


def crop(photo: Image.Image, right: bool, rng: np.random.Generator) -> Image.Image:
    """A random square out of the left or the right half of the photograph."""
    half = photo.width // 2
    side = int(min(half, photo.height) * rng.uniform(0.6, 1.0))
    x = int(rng.integers(0, half - side + 1)) + (half if right else 0)
    y = int(rng.integers(0, photo.height - side + 1))
    square = photo.crop((x, y, x + side, y + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square


def _crops(count: int, right: bool, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    photos = [load_photo(OBJECTS[index % len(OBJECTS)]) for index in range(count)]
    return np.stack([preprocess(crop(photo, right, rng)) for photo in photos])


def _labelled(model: FloatModel, images: Array) -> Arrays:
    labels = [int(model.run({"image": image[None]})["logits"].argmax()) for image in images]
    return {"image": images, "label": np.array(labels, dtype=np.int64)}


def build(model_path: Path) -> DataSet:
    """64 calibration crops of the left halves, 110 evaluation crops of the right halves."""
    model = FloatModel(model_path)
    return DataSet(_labelled(model, _crops(64, False, 601)), _labelled(model, _crops(110, True, 602)))
