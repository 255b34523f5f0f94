"""Rendered text lines with known content, shared by the three OCR models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .dataset import Array

# Fonts that ship in the matplotlib wheel: no system package is needed to draw.
FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
)

_WORD_LIST = (
    "invoice total amount delivery address customer number account payment due date order item "
    "quantity price summer winter garden window river mountain market station kitchen harbour "
    "Paris London Berlin Madrid Vienna Oslo Tokyo Lisbon Prague Dublin north south east west open "
    "closed entrance exit warning private parking ticket platform departure arrival museum library "
    "bakery coffee sugar butter bread apple orange lemon water model signal vector matrix kernel "
    "graph tensor memory buffer thread socket review release version quick brown fox jumps lazy dog"
)
WORDS = _WORD_LIST.split()

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    """A random one of the fonts at `size` pixels."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / FONT_FILES[rng.integers(len(FONT_FILES))]), size)


def random_text(rng: np.random.Generator) -> str:
    """A line as papers and signs have it: words, dates, prices, codes, addresses."""
    words = [WORDS[i] for i in rng.integers(len(WORDS), size=3)]
    number = int(rng.integers(1, 10_000))
    day, month = int(rng.integers(1, 29)), int(rng.integers(12))
    texts = (
        f"{words[0]} {words[1]}",
        f"{words[0].title()} {words[1].title()}",
        words[0].upper() + " " + words[1].upper(),
        f"{day} {_MONTHS[month]} {2000 + number % 30}",
        f"{2000 + number % 30}-{month + 1:02d}-{day:02d}",
        f"{words[0]}: {number / 100:.2f}",
        f"{words[0][:3].upper()}-{number:05d}",
        f"{words[0]}@{words[1]}.com",
        f"{number} {words[0].title()} St.",
        f"+{number % 90 + 10} {number:04d} {day:02d}{month:02d}",
    )
    return texts[rng.integers(len(texts))]


@dataclass(frozen=True)
class LineStyle:
    """How hard a rendered line is to read."""

    min_size: int
    max_rotation: float
    max_blur: float
    max_noise: float
    min_contrast: int


def colours(rng: np.random.Generator, min_contrast: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper, at least `min_contrast` grey levels apart; one in four is light on dark."""
    dark = rng.integers(0, 90, size=3)
    light = np.minimum(dark.mean() + min_contrast + rng.integers(0, 120, size=3), 255).astype(int)
    ink, paper = (light, dark) if rng.random() < 0.25 else (dark, light)
    return tuple(int(v) for v in ink), tuple(int(v) for v in paper)


def render_line(text: str, rng: np.random.Generator, style: LineStyle) -> Image.Image:
    """One line of text, cropped as a detector crops it, with slight rotation, blur and noise."""
    face = font(rng, int(rng.integers(style.min_size, 44)))
    left, top, right, bottom = face.getbbox(text)
    margin = rng.integers(1, 7, size=4)
    size = (int(right - left + margin[0] + margin[2]), int(bottom - top + margin[1] + margin[3]))
    ink, paper = colours(rng, style.min_contrast)
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).text((margin[0] - left, margin[1] - top), text, fill=ink, font=face)
    angle = float(rng.uniform(-style.max_rotation, style.max_rotation))
    image = image.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, style.max_blur))))
    return add_noise(image, rng, float(rng.uniform(0, style.max_noise)))


def add_noise(image: Image.Image, rng: np.random.Generator, sigma: float) -> Image.Image:
    """Gaussian sensor noise."""
    pixels = np.asarray(image, dtype=np.float64)
    noisy = np.clip(pixels + rng.normal(0, sigma, pixels.shape), 0, 255)
    return Image.fromarray(noisy.round().astype(np.uint8))


def normalise(image: Image.Image) -> Array:
    """[3, H, W] float32 in BGR, (x / 255 - 0.5) / 0.5, as PP-OCR reads images through OpenCV."""
    bgr = np.asarray(image, dtype=np.float32)[:, :, ::-1]
    scaled = (bgr / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def fit_line(image: Image.Image, height: int, width: int) -> Array:
    """Scale to `height`, squeeze what is longer than `width`, pad the rest with zeros."""
    scaled = min(width, max(1, -(-height * image.width // image.height)))
    resized = image.resize((scaled, height), Image.Resampling.BILINEAR)
    padded = np.zeros((3, height, width), dtype=np.float32)
    padded[:, :, :scaled] = normalise(resized)
    return padded
