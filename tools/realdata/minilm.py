"""Sentences out of the standard library's docstrings; the label is the float model's embedding."""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

import numpy as np

from .dataset import Array, Arrays, DataError, DataSet, FloatModel

# Modules with prose about different things: every sentence has related and unrelated neighbours.
SOURCES = (
    "argparse.py", "asyncio/queues.py", "calendar.py", "collections/__init__.py", "configparser.py",
    "contextlib.py", "csv.py", "datetime.py", "difflib.py", "fractions.py", "ftplib.py", "functools.py",
    "heapq.py", "http/client.py", "imaplib.py", "inspect.py", "ipaddress.py", "logging/__init__.py",
    "mailbox.py", "pathlib.py", "random.py", "shutil.py", "smtplib.py", "socket.py", "statistics.py",
    "string.py", "subprocess.py", "tarfile.py", "tempfile.py", "textwrap.py", "threading.py",
    "unittest/case.py", "urllib/request.py", "uuid.py", "zipfile.py",
)  # fmt: skip
_MAX_TOKENS = 64
_CALIBRATION, _EVALUATION = 48, 120


def docstrings(path: Path) -> list[str]:
    """The first sentences of the module's public docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text:
            sentence = re.split(r"\n\s*\n|(?<=[.])\s", text.strip())[0]
            found.append(" ".join(sentence.split()))
    return found


def sentences() -> list[str]:
    """Different sentences of 5 to 40 words, in a random but fixed order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = {text for name in SOURCES if (stdlib / name).is_file() for text in docstrings(stdlib / name)}
    fitting = sorted(text for text in texts if 5 <= len(text.split()) <= 40 and text.isascii())
    if len(fitting) < _CALIBRATION + _EVALUATION:
        raise DataError(f"only {len(fitting)} sentences in the standard library's docstrings")
    order = np.random.default_rng(701).permutation(len(fitting))
    return [fitting[index] for index in order]


def _encode(model: FloatModel, tokenizer_file: Path, texts: list[str]) -> Arrays:
    """Members with their own length each, and the float embeddings as `reference`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.no_padding()
    arrays: Arrays = {}
    references: list[Array] = []
    for index, text in enumerate(texts):
        encoded = tokenizer.encode(text)
        feeds: Arrays = {
            "input_ids": np.array([encoded.ids], dtype=np.int64),
            "attention_mask": np.array([encoded.attention_mask], dtype=np.int64),
            "token_type_ids": np.array([encoded.type_ids], dtype=np.int64),
        }
        arrays |= {f"{name}/{index}": array for name, array in feeds.items()}
        references.append(model.run(feeds)["embedding"][0])
    return arrays | {"reference": np.stack(references)}


def build(model_path: Path) -> DataSet:
    """48 calibration and 120 evaluation sentences."""
    model, tokenizer_file = FloatModel(model_path), model_path.with_name("tokenizer.json")
    texts = sentences()
    calibration, evaluation = texts[:_CALIBRATION], texts[_CALIBRATION : _CALIBRATION + _EVALUATION]
    return DataSet(_encode(model, tokenizer_file, calibration), _encode(model, tokenizer_file, evaluation))
