"""The digits model in each framework, made in that framework's own environment, and where those environments are."""

from __future__ import annotations

import os
import shutil
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
    least: float = 0.75
    """Accuracy that its training on 300 digits reaches here and on other machines."""


SOURCES = (
    Made("torch", "net.pt2"),
    Made("torch", "net.py:make", ("--input-shape", "image:batch,1,8,8")),
    Made("torch", "net.ts", ("--allow-code", "--input-shape", "x:batch,1,8,8")),
    Made("torch", "vit"),
    Made("torch", "resnet.py:make", ("--input-shape", "x:batch,3,32,32"), layout="rgb"),
    Made("torch", "bert", layout="tokens", least=0.6),
    Made("sklearn", "linear.skops", layout="flat"),
    Made("sklearn", "mlp.skops", layout="flat"),
    Made("sklearn", "hist.skops", layout="flat"),
    Made("sklearn", "trees.ubj", layout="flat"),
    Made("sklearn", "trees.txt", layout="flat"),
    Made("sklearn", "trees.cbm", layout="flat"),
    Made("tensorflow", "net.keras", layout="nhwc"),
    Made("tensorflow", "gelu.keras", layout="nhwc"),
    Made("tensorflow", "mobilenet.keras", layout="rgb_nhwc", least=0.45),
    Made("tensorflow", "saved", layout="nhwc"),
    Made("tensorflow", "net.tflite", layout="nhwc"),
    Made("tensorflow", "int8.tflite", layout="nhwc"),
    Made("jax", "fn.py:net", ("--input-shape", "x:batch,64"), layout="flat"),
    Made("paddle", "paddle.json"),
)
LAYOUTS = {
    "nchw": ["image"],
    "nhwc": ["image"],
    "flat": ["X"],
    "rgb": ["x"],
    "rgb_nhwc": ["image"],
    "tokens": ["input_ids", "attention_mask", "token_type_ids"],
}
"""How sources take the images, and what the inputs are called in the data files."""
ENVIRONMENTS = tuple(dict.fromkeys(made.environment for made in SOURCES))


def interpreter(environment: str) -> Path | None:
    """The python of a framework's environment: below ``$GRAPHOPT_FRAMEWORKS``, or ``.frameworks/`` of the checkout."""
    root = Path(os.environ.get("GRAPHOPT_FRAMEWORKS", ROOT / ".frameworks"))
    path = root / environment / "bin" / "python"
    return path if path.exists() else None


def write_data(folder: Path) -> None:
    """train (300 labelled digits), calib, and test (297 other labelled ones) in every layout."""
    demo = ROOT / "graphopt" / "demo"
    known, others = np.load(demo / "evaluation.npz"), np.load(demo / "calibration.npz")["image"]
    images, labels = known["image"][300:], known["label"][300:]
    for layout, names in LAYOUTS.items():
        end = "" if layout == "nchw" else f"_{layout}"
        np.savez(folder / f"train{end}.npz", label=known["label"][:300], **feeds(known["image"][:300], layout, names))
        np.savez(folder / f"calib{end}.npz", **feeds(others, layout, names))
        np.savez(folder / f"test{end}.npz", label=labels, **feeds(images, layout, names))


def make(environment: str, folder: Path) -> None:
    """Train and save a framework's sources, or take those that ``$GRAPHOPT_SOURCES`` keeps from an earlier time.

    Raises:
        RuntimeError: it could not.
    """
    kept = Path(os.environ["GRAPHOPT_SOURCES"]) / environment if "GRAPHOPT_SOURCES" in os.environ else None
    if kept is not None and kept.is_dir():
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        return
    python = interpreter(environment)
    script = HERE / f"{environment}_sources.py"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [str(python), str(script), str(folder)], capture_output=True, text=True, env=clean, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script.name}: {done.stderr[-500:]}")
    if kept is not None:
        shutil.copytree(folder, kept)


def feeds(images: np.ndarray, layout: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Images (n, 1, 8, 8) as a source takes them, under the names of its inputs.

    ``rgb``: 32 x 32 in three channels; ``tokens``: 16 patches of 2 x 2 as words of a vocabulary of 16, with a
    mask and types, as BERT takes text.
    """
    if layout == "tokens":
        dark = (images > 0.3).reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        ids = dark @ np.array([1, 2, 4, 8])
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return {name: known[name] for name in names}
    if layout == "flat":
        images = images.reshape(len(images), -1)
    if layout.startswith("rgb"):
        images = np.repeat(images.repeat(4, axis=2).repeat(4, axis=3), 3, axis=1)
    return {names[0]: images.transpose(0, 2, 3, 1) if layout.endswith("nhwc") else images}
