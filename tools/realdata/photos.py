"""Real photographs that ship inside the wheels of scikit-image, scikit-learn and matplotlib."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from PIL import Image

from .dataset import DataError

# Pictures of things that an ImageNet model knows or takes for something it knows.
OBJECTS = (
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/camera.png",
    "skimage/data/clock_motion.png",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)
# Surfaces and scientific pictures: good backgrounds, but no classifier is sure what they show.
TEXTURES = (
    "skimage/data/coins.png",
    "skimage/data/ihc.png",
    "skimage/data/retina.jpg",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/moon.png",
    "skimage/data/brick.png",
    "skimage/data/grass.png",
    "skimage/data/gravel.png",
)
PHOTOS = OBJECTS + TEXTURES


@cache
def load_photo(member: str) -> Image.Image:
    """The photograph as RGB. Read from the package's folder: importing the package costs seconds."""
    package, _, rest = member.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    path = Path(spec.origin).parent / rest
    if not path.is_file():
        raise DataError(f"{path} is missing: this version of {package} ships no such photograph")
    with Image.open(path) as image:
        return image.convert("RGB")
