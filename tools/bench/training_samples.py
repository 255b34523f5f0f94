"""Samples without labels to train real models on, of the kind that they are calibrated on but none of the same."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from realdata.efficientnet import _crops
from realdata.minilm import docstrings, sentences
from realdata.rapidocr_rec import _lines, dictionary

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache" / "models"
_LONGEST = 48  # tokens; lengths are padded to eights, since each of them is a gradient graph of its own


def samples(name: str, count: int) -> list[dict[str, Any]]:
    """``count`` new samples for a model: text lines, crops of the calibration halves of photographs, sentences."""
    if name == "rapidocr-rec":
        lines = _lines(count, 103, dictionary(CACHE / name / "model.onnx"))
        return [{"x": line[None]} for line in lines["x"]]
    if name == "efficientnet-lite0":
        return [{"image": crop[None]} for crop in _crops(count, False, 603)]
    if name == "minilm":
        return list(_encoded(_corpus(count)))
    raise SystemExit(f"--train makes samples for rapidocr-rec, efficientnet-lite0 and minilm, not for {name}")


def _corpus(count: int) -> list[str]:
    """Sentences of the standard library's docstrings, none of them one that MiniLM is calibrated or judged on."""
    held = set(sentences())
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(path.parts):
            continue
        try:
            found.update(docstrings(path))
        except (SyntaxError, UnicodeDecodeError):
            continue
    fitting = sorted(t for t in found - held if 5 <= len(t.split()) <= 40 and t.isascii())
    order = np.random.default_rng(7).permutation(len(fitting))
    return [fitting[index] for index in order[:count]]


def _encoded(texts: list[str]) -> Iterator[dict[str, Any]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CACHE / "minilm" / "tokenizer.json"))
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding(pad_to_multiple_of=8)
    for text in texts:
        told = tokenizer.encode(text)
        rows = {"input_ids": told.ids, "attention_mask": told.attention_mask, "token_type_ids": told.type_ids}
        yield {name: np.array([row], np.int64) for name, row in rows.items()}
