"""The digits model in each framework, made in that framework's own environment, and where those environments are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Made:
    """One source: its framework's environment, what ``graphopt convert`` is given, how it takes the images."""

    environment: str
    source: str
    options: Sequence[str] = ()
    layout: str = "nchw"


SOURCES = (
    Made("torch", "net.pt2"),
    Made("torch", "net.py:make", ("--input-shape", "image:batch,1,8,8")),
    Made("torch", "net.ts", ("--allow-code", "--input-shape", "x:batch,1,8,8")),
    Made("torch", "vit"),
    Made("sklearn", "linear.skops", layout="flat"),
    Made("sklearn", "mlp.skops", layout="flat"),
    Made("sklearn", "hist.skops", layout="flat"),
    Made("sklearn", "trees.ubj", layout="flat"),
    Made("sklearn", "trees.txt", layout="flat"),
    Made("sklearn", "trees.cbm", layout="flat"),
    Made("tensorflow", "net.keras", layout="nhwc"),
    Made("tensorflow", "gelu.keras", layout="nhwc"),
    Made("tensorflow", "saved", layout="nhwc"),
    Made("tensorflow", "net.tflite", layout="nhwc"),
    Made("tensorflow", "int8.tflite", layout="nhwc"),
    Made("jax", "fn.py:net", ("--input-shape", "x:batch,64"), layout="flat"),
    Made("paddle", "paddle.json"),
)
ENVIRONMENTS = tuple(dict.fromkeys(made.environment for made in SOURCES))


def interpreter(environment: str) -> Path | None:
    """The python of a framework's environment: below ``$GRAPHOPT_FRAMEWORKS``, or ``.frameworks/`` of the checkout."""
    root = Path(os.environ.get("GRAPHOPT_FRAMEWORKS", ROOT / ".frameworks"))
    path = root / environment / "bin" / "python"
    return path if path.exists() else None


def write_data(folder: Path) -> None:
    """train.npz (300 labelled digits), and calib and test (297 others) as channels first, last, and flat rows."""
    demo = ROOT / "graphopt" / "demo"
    known, others = np.load(demo / "evaluation.npz"), np.load(demo / "calibration.npz")["image"]
    np.savez(folder / "train.npz", image=known["image"][:300], label=known["label"][:300])
    images, labels = known["image"][300:], known["label"][300:]
    for end, layout, key in (("", "nchw", "image"), ("_nhwc", "nhwc", "image"), ("_flat", "flat", "X")):
        np.savez(folder / f"calib{end}.npz", **{key: shaped(others, layout)})
        np.savez(folder / f"test{end}.npz", label=labels, **{key: shaped(images, layout)})


def make(environment: str, folder: Path) -> None:
    """Train and save a framework's sources.

    Raises:
        RuntimeError: it could not.
    """
    python = interpreter(environment)
    script = HERE / f"{environment}_sources.py"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [str(python), str(script), str(folder)], capture_output=True, text=True, env=clean, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script.name}: {done.stderr[-500:]}")


def shaped(images: np.ndarray, layout: str) -> np.ndarray:
    """Images (n, 1, 8, 8) as a source takes them."""
    if layout == "flat":
        return images.reshape(len(images), -1)
    return images.transpose(0, 2, 3, 1) if layout == "nhwc" else images
