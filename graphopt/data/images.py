"""Folders of images, prepared the way the user declares; needs the `image` extra (pillow)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np

from graphopt.data.check import kind
from graphopt.data.dataset import Array, Sample
from graphopt.data.stored import one_line
from graphopt.errors import DataError, InputError

if TYPE_CHECKING:
    from graphopt.model import ValueSpec

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))


@dataclass(frozen=True)
class ImageOptions:
    """How pixels become the model's numbers: ``(pixel * scale - mean) / std``, per channel in ``order``.

    ``size`` is (height, width) or one number for both; ``fit`` "stretch" resizes to it, "crop" resizes the
    shorter side and cuts the centre. For a model that takes integers leave ``scale=1`` and mean, std alone.
    Raises InputError for sizes, means or deviations that make no sense.
    """

    size: int | tuple[int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    order: Literal["RGB", "BGR", "L"] = "RGB"
    fit: Literal["stretch", "crop"] = "stretch"

    def __post_init__(self) -> None:
        if min(self.height_width) < 1:
            raise InputError(f"image size {self.size} is not positive; give (height, width) in pixels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise InputError(
                    f"image {name} has {len(values)} values for {self.channels} channels ({self.order}); "
                    f"give 1 or {self.channels}"
                )
        if 0 in self.std:
            raise InputError("image std is 0 for a channel; give the deviation used in training")
        for name, value, allowed in (
            ("layout", self.layout, ("NCHW", "NHWC")),
            ("order", self.order, ("RGB", "BGR", "L")),
            ("fit", self.fit, ("stretch", "crop")),
        ):
            if value not in allowed:
                raise InputError(f"image {name} '{value}' is unknown; use one of {', '.join(allowed)}")

    @property
    def height_width(self) -> tuple[int, int]:
        """The size as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def channels(self) -> int:
        """1 for greyscale, else 3."""
        return 1 if self.order == "L" else 3

    @property
    def is_raw(self) -> bool:
        """Whether the pixels stay the integers they are."""
        return self.scale == 1 and set(self.mean) == {0} and set(self.std) == {1}


class ImageReader:
    """One image per sample, float32 (or the model's integers) [1,C,H,W] or [1,H,W,C].

    With one subfolder per class, ``label`` is the class's index in sorted order, int64[1].
    """

    def __init__(self, root: Path, files: Sequence[Path], inputs: Sequence[ValueSpec], options: ImageOptions) -> None:
        if len(inputs) != 1:
            raise DataError(
                f"'{root.name}' is a folder of images but the model has {len(inputs)} inputs; "
                "prepare the samples as .npz or with a generator, module.py:function"
            )
        self._pillow = _pillow()
        self._root = root
        self._files = files
        self._spec = inputs[0]
        self._options = options
        classes = sorted({file.parent.name for file in files if file.parent != root})
        sorted_in = bool(classes) and all(file.parent != root for file in files)
        self._classes = {name: i for i, name in enumerate(classes)} if sorted_in else {}
        dtype = self._spec.dtype
        self._integer = dtype is not None and kind(dtype) in "iu"
        if self._integer and not options.is_raw:
            raise InputError(
                f"input '{self._spec.name}' takes integers ({self._spec}) but the images are to be scaled; "
                "set scale=1, mean=0 and std=1"
            )

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return f"{self._root.name}/{self._files[index].relative_to(self._root).as_posix()}"

    def read(self, indices: Sequence[int]) -> Iterator[Sample]:
        for index in indices:
            sample = {self._spec.name: self._load(index)}
            if self._classes:
                sample["label"] = np.array([self._classes[self._files[index].parent.name]], np.int64)
            yield sample

    def _load(self, index: int) -> Array:
        pixels = self._pixels(index)
        options = self._options
        if options.order == "L":
            pixels = pixels[:, :, np.newaxis]
        elif options.order == "BGR":
            pixels = pixels[:, :, ::-1]
        if self._integer:
            ready: Array = pixels
        else:
            mean, std = np.array(options.mean, np.float32), np.array(options.std, np.float32)
            ready = (pixels.astype(np.float32) * np.float32(options.scale) - mean) / std
        if options.layout == "NCHW":
            ready = ready.transpose(2, 0, 1)
        return np.ascontiguousarray(ready[np.newaxis], dtype=self._spec.dtype if self._integer else None)

    def _pixels(self, index: int) -> Array:
        """uint8 [H,W,3] or [H,W]; raises DataError for anything pillow cannot or should not decode."""
        height, width = self._options.height_width
        image = self._pillow
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", image.DecompressionBombWarning)
                with image.open(self._files[index]) as opened:
                    picture = opened.convert("L" if self._options.order == "L" else "RGB")
            box = _centre(picture.size, (width, height)) if self._options.fit == "crop" else None
            resized = picture.resize((width, height), image.Resampling.BILINEAR, box=box)
            return np.asarray(resized, np.uint8)
        except Exception as error:  # pillow's decoders raise nearly anything on broken files
            raise DataError(
                f"sample '{self.name(index)}' cannot be decoded ({one_line(error)}); remove or replace it"
            ) from error


def _centre(have: tuple[int, int], want: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box of ``have`` (width, height) with the proportions of ``want``."""
    ratio = min(have[0] / want[0], have[1] / want[1])
    width, height = want[0] * ratio, want[1] * ratio
    left, top = (have[0] - width) / 2, (have[1] - height) / 2
    return left, top, left + width, top + height


def _pillow() -> ModuleType:
    try:
        import PIL.Image as pillow
    except ImportError as error:
        raise InputError('images need pillow, which is not installed; pip install "graphopt[image]"') from error
    module: ModuleType = pillow
    return module
