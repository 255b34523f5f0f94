"""Which framework a source comes from, by its bytes and structure. Nothing of it is run and no framework imported."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.conversion.archives import fields, members
from graphopt.conversion.exported_program import what_runs
from graphopt.conversion.front_ends import FRONT_ENDS
from graphopt.errors import InputError, did_you_mean
from graphopt.external import shown
from graphopt.opened import open_regular
from graphopt.remote import is_address, local

HEAD = 1 << 16
"""Bytes of a file that are looked at."""

_LIBRARIES = {
    "torch": "torch",
    "torchvision": "torch",
    "timm": "torch",
    "jax": "jax",
    "flax": "jax",
    "equinox": "jax",
}
"""What a Python file imports -> what it makes."""


@dataclass(frozen=True)
class Source:
    """A source and what it was taken for: ``kind`` is a key of :data:`FRONT_ENDS`; ``function`` of a Python file."""

    path: Path
    kind: str
    function: str | None = None


def recognise(text: str, kind: str | None = None) -> Source:
    """What ``text`` (a path, or ``file.py:function``) is; ``kind`` overrides what the bytes say.

    Raises:
        InputError: no such file, a form nobody knows, or one that is refused, with the way round.
    """
    if kind is not None and kind not in FRONT_ENDS:
        raise InputError(f"unknown framework '{kind}'; {did_you_mean(kind, FRONT_ENDS, _known())}")
    stem, colon, function = text.rpartition(".py:")
    if is_address(text) and text.partition(":")[2].rpartition(":")[0].endswith(".py"):
        raise InputError(f"{shown(text)}: code is run from a file here only; copy it, look at it, and name the copy")
    path = Path(stem + ".py") if colon else local(text)
    if not path.exists():
        raise InputError(f"no such file or folder: {shown(text)}; check the path")
    if path.suffix == ".py" and path.is_file():
        if not colon or not function:
            raise InputError(f"{shown(text)} is a Python file; name the function that returns the model: {path}:make")
        return Source(path, kind or _imports(path), function)
    if colon:
        raise InputError(f"{shown(str(path))} is no Python file, so it has no function '{function}'; name a .py file")
    found = _folder(path) if path.is_dir() else _file(path)
    if isinstance(found, _Unknown):
        if kind is None:
            raise InputError(f"{shown(text)} {found.why}" + ("" if ";" in found.why else f"; {_SAY}"))
        found = kind
    return Source(path, kind or found)


@dataclass(frozen=True)
class _Unknown:
    """What was found instead of something to convert; ``why`` continues a sentence that begins with the path."""

    why: str


def _known() -> str:
    return "one of " + ", ".join(FRONT_ENDS)


def _imports(path: Path) -> str:
    """The framework that a Python file imports, read and not run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{shown(str(path))} is no Python that can be read ({error}); fix the file") from error
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    found = sorted({_LIBRARIES[name] for name in names if name in _LIBRARIES})
    if len(found) == 1:
        return found[0]
    seen = f"imports {' and '.join(found)}" if found else "imports neither torch nor jax"
    raise InputError(f"{shown(str(path))} {seen}; say which it is: --from torch or --from jax")


# Folders


def _folder(path: Path) -> str | _Unknown:
    if (path / "saved_model.pb").is_file():
        return "savedmodel"
    if (path / "config.json").is_file() and _weights(path):
        return "transformers"
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if "Manifest.json" in names and "Data" in names:
        return _Unknown(_COREML)
    if any(n.endswith((".pdmodel", ".pdiparams")) for n in names):
        return _Unknown("is a folder with a Paddle model; name its .pdmodel or .json file")
    if any(n.startswith(("pytorch_model", "model.ckpt")) for n in names):
        return _Unknown(
            "has its weights in a pickle (pytorch_model.bin), which may run code; save it again with "
            "save_pretrained(folder), which writes safetensors"
        )
    if "model.safetensors.index.json" in names or any(n.endswith(".safetensors") for n in names):
        return _Unknown("has safetensors but no config.json; weights alone do not say what they are the weights of")
    inside = ", ".join(sorted(names)[:4]) or "nothing"
    return _Unknown(f"is a folder with {inside} in it, which is no SavedModel and no transformers model; {_SAY}")


def _weights(path: Path) -> bool:
    return any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


# Files

_SAY = "name the file itself, or say what it is with --from"
_COREML = (
    "is a CoreML model, which has no converter to ONNX that is kept up; convert the model it was made from (PyTorch, "
    "Keras, ...)"
)
_PICKLE = (
    "is a pickle, and loading one runs whatever code it holds; save it with skops (skops.io.dump), or, if you trust "
    "where it comes from, give --allow-pickle"
)
_MAGIC: tuple[tuple[int, bytes, str | _Unknown], ...] = (
    (4, b"TFL3", "tflite"),
    (0, b"CBM1", "catboost"),
    (4, b"ORTM", _Unknown("is ONNX Runtime's own .ort form, which cannot be turned back; use the ONNX it came from")),
    (
        0,
        b"GGUF",
        _Unknown(
            "is a GGUF file of llama.cpp, whose quantized blocks have no ONNX operators; take the original checkpoint "
            "(a transformers folder) instead"
        ),
    ),
    (
        0,
        b"\x89HDF",
        _Unknown(
            "is an HDF5 file (Keras .h5), whose layers may carry code; load it where you trust it and save it as "
            ".keras: keras.models.load_model(PATH).save('model.keras')"
        ),
    ),
    (0, b"\x93NUMPY", _Unknown("is a NumPy array, no model")),
)


def _file(path: Path) -> str | _Unknown:
    try:
        with open_regular(path, shown(str(path))) as stream:
            head = stream.read(HEAD)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {shown(str(path))}: {reason}; check the path and its permissions") from error
    if not head:
        return _Unknown("is empty; was the export interrupted?")
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    for offset, magic, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kind
    for look in (_pickle, _safetensors, _text, _stablehlo, _protobuf):
        found = look(path, head)
        if found is not None:
            return found
    return _Unknown(f"is nothing that is recognised; {_SAY} ({', '.join(FRONT_ENDS)})")


def _archive(path: Path) -> str | _Unknown:
    names = members(path)
    tails = {name.split("/", 1)[-1] for name in names}
    if {"config.json", "metadata.json", "model.weights.h5"} <= set(names):
        return "keras"
    if "schema.json" in names:
        return "skops"
    if any(name.endswith("models/model.json") for name in names) or "serialized_exported_program.json" in tails:
        return "pt2"
    if any(tail.startswith("code/") for tail in tails) and "data.pkl" in tails:
        return "torchscript"
    if "data.pkl" in tails:
        return _Unknown(
            "was written by torch.save, a pickle of weights that does not say what they are the weights of; write a "
            "function that makes the module and loads them, and convert module.py:function"
        )
    if names and all(name.endswith(".npy") for name in names):
        return _Unknown("is a NumPy .npz of arrays, no model")
    return _Unknown(f"is a zip archive of nothing that is recognised ({shown(', '.join(names[:3]))}, ...); {_SAY}")


def _pickle(path: Path, head: bytes) -> str | None:
    if head[0] == 0x80 and len(head) > 1 and head[1] in range(1, 6):
        return "pickle"
    packed = head.startswith((b"\x78\x01", b"\x78\x9c", b"\x78\xda", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
    return "pickle" if packed and path.suffix in (".joblib", ".pkl", ".pickle", ".gz", ".z", ".bz2", ".xz") else None


def _safetensors(path: Path, head: bytes) -> _Unknown | None:
    size = int.from_bytes(head[:8], "little")
    if len(head) > 9 and head[8:9] == b"{" and 2 <= size <= path.stat().st_size - 8:
        return _Unknown(
            "has weights alone (safetensors), which do not say what they are the weights of; give the folder with its "
            "config.json (transformers), or module.py:function that makes the module and loads them"
        )
    return None


def _text(path: Path, head: bytes) -> str | _Unknown | None:
    start = head.lstrip()
    if start.startswith(b"tree\n") and b"version=" in head[:200]:
        return "lightgbm"
    if re.match(rb"(<\?xml[^>]*>\s*)?<net\b", start):
        return _Unknown(
            "is an OpenVINO IR, which has no way back to ONNX; convert the model it was made from, and go there at "
            "the end with graphopt export --to openvino"
        )
    if start.startswith(b"<?xml") and b"<PMML" in head:
        return _Unknown("is PMML, which nothing converts to ONNX; convert the model it was made from")
    if start.startswith(b"{"):
        return _braces(path, start)
    return None


def _stablehlo(path: Path, head: bytes) -> _Unknown | None:
    """What ``jax.export`` serializes, a flatbuffer around MLIR's bytecode, or that bytecode bare."""
    at = head.find(b"ML\xefR")
    if at < 0 or (at > 0 and b"StableHLO_v" not in head[at : at + 64]):
        return None
    what = "a serialized jax.export" if at else "an MLIR module (StableHLO)"
    return _Unknown(
        f"is {what}, a compiled program that jax2onnx cannot look into; give the function it was made from: "
        "module.py:function, with --input-shape"
    )


def _braces(path: Path, start: bytes) -> str | _Unknown | None:
    if b"learner" in start[:4096] and (b"gradient_booster" in start or b"learner_model_param" in start):
        return "xgboost"
    if b'"magic"' in start[:400] and b'"pir"' in start[:400]:
        return "paddle"
    if b"class_name" in start[:4096] and b"keras" in start:
        return _Unknown("is the architecture of a Keras model without its weights; save the model as .keras")
    if path.name == "config.json":
        return _Unknown("describes a model that lies beside it; give the folder")
    try:
        found: Any = json.loads(start) if len(start) < HEAD else None
    except ValueError:
        found = None
    return _Unknown("is JSON that describes no model known here") if isinstance(found, dict) else None


def _protobuf(path: Path, head: bytes) -> str | _Unknown | None:
    found = list(fields(head))
    numbers = {number for number, _, _ in found}
    first = found[0] if found else (0, 0, 0)
    if first[:2] == (1, 0):
        if numbers & {7, 8} and first[2] in range(1, 100) and not numbers & set(range(200, 4000)):
            return _Unknown("is an ONNX model already; graphopt optimize, quantize and compare take it as it is")
        if 2 in numbers and numbers & set(range(200, 4000)):
            return _Unknown(_COREML)
        if path.name == "saved_model.pb":
            return _Unknown("is part of a SavedModel; give its folder")
    if first[:2] == (1, 2) and isinstance(first[2], bytes):
        return _program(first[2])
    return None


def _program(first: bytes) -> str | None:
    """A TensorFlow GraphDef (its first node: name, op) or a Paddle ProgramDesc (its first block: index, parent)."""
    inner = [(number, wire) for number, wire, _ in fields(first, 4)]
    if inner[:2] == [(1, 2), (2, 2)]:
        return "graphdef"
    return "paddle" if inner[:2] == [(1, 0), (2, 0)] else None


def refuse_what_runs(source: Source, *, allow_pickle: bool, allow_code: bool) -> None:
    """Raise InputError for what may run code of its own while it is loaded, unless the user allowed it."""
    asks: dict[str, tuple[bool, str]] = {
        "pickle": (allow_pickle, _PICKLE),
        "torchscript": (
            allow_code,
            "is TorchScript, which is a program and not only weights; if you trust where it comes from, give "
            "--allow-code (or export the module with torch.export, and convert the .pt2)",
        ),
    }
    if source.kind == "pt2" and not allow_code:
        runs = what_runs(source.path)
        if runs is not None:
            raise InputError(
                f"{shown(str(source.path))} holds {runs}, which may run code when it is loaded; if you trust where it "
                "comes from, give --allow-code"
            )
    allowed, why = asks.get(source.kind, (True, ""))
    if not allowed:
        raise InputError(f"{shown(str(source.path))} {why}")
