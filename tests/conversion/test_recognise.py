"""What a source is taken for, by its bytes and structure; what is refused, with the way round."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, ROOT, run_cli

from graphopt.conversion.archives import fields
from graphopt.conversion.exported_program import is_size, what_runs
from graphopt.conversion.front_ends import FRONT_ENDS
from graphopt.conversion.recognise import recognise, refuse_what_runs
from graphopt.errors import InputError


def archive(path: str, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return Path(path)


def field(number: int, data: bytes | int) -> bytes:
    """One field of a protobuf message (small numbers and lengths only)."""
    if isinstance(data, int):
        return key(number, 0) + bytes([data])
    return key(number, 2) + bytes([len(data)]) + data


def key(number: int, wire: int) -> bytes:
    value, out = number << 3 | wire, b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


PT2 = {"net/models/model.json": b"{}", "net/archive_format": b"pt2"}
KEPT: dict[str, tuple[Callable[[], object], str]] = {
    "a.pt2": (lambda: archive("a.pt2", PT2), "pt2"),
    "a.ts": (lambda: archive("a.ts", {"a/data.pkl": b"", "a/code/__torch__.py": b""}), "torchscript"),
    "a.keras": (
        lambda: archive("a.keras", {"config.json": b"{}", "metadata.json": b"{}", "model.weights.h5": b""}),
        "keras",
    ),
    "a.skops": (lambda: archive("a.skops", {"schema.json": b"{}", "1.npy": b""}), "skops"),
    "a.tflite": (lambda: Path("a.tflite").write_bytes(b"\x1c\0\0\0TFL3" + b"\0" * 20), "tflite"),
    "a.cbm": (lambda: Path("a.cbm").write_bytes(b"CBM1\0\0\0\0"), "catboost"),
    "a.pkl": (lambda: Path("a.pkl").write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "a.joblib": (lambda: Path("a.joblib").write_bytes(b"\x78\x9cabc"), "pickle"),
    "a.json": (lambda: Path("a.json").write_text('{"learner":{"attributes":{},"gradient_booster":{}}}'), "xgboost"),
    "a.ubj": (lambda: Path("a.ubj").write_bytes(b"{L\0\0\0\0\0\0\0\7learner{L\0\x10gradient_booster"), "xgboost"),
    "a.txt": (lambda: Path("a.txt").write_text("tree\nversion=v4\nnum_class=1\n"), "lightgbm"),
    "b.json": (lambda: Path("b.json").write_text('{"base_code":{"magic":"pir","trainable":true}}'), "paddle"),
    "a.pb": (lambda: Path("a.pb").write_bytes(field(1, field(1, b"x") + field(2, b"Placeholder"))), "graphdef"),
    "a.pdmodel": (lambda: Path("a.pdmodel").write_bytes(field(1, field(1, 0) + field(2, 1))), "paddle"),
    "net.py:make": (lambda: Path("net.py").write_text("import numpy\nfrom torch import nn\n"), "torch"),
    "fn.py:make": (lambda: Path("fn.py").write_text("def f():\n    import flax.linen\n"), "jax"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_it_is(name: str, workplace: Path) -> None:
    make, kind = KEPT[name]
    make()
    assert recognise(name).kind == kind


def test_folders(workplace: Path) -> None:
    Path("saved").mkdir()
    Path("saved/saved_model.pb").write_bytes(b"\x08\x01")
    assert recognise("saved").kind == "savedmodel"
    Path("bert").mkdir()
    Path("bert/config.json").write_text("{}")
    Path("bert/model.safetensors").write_bytes(b"")
    assert recognise("bert").kind == "transformers"


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    return stream.getvalue()


def state_dict() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        out.writestr("state/data.pkl", b"x")
    return stream.getvalue()


COREML = field(1, 8) + field(2, b"about it") + field(500, b"network")
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "GGUF": (b"GGUF\3\0\0\0", "GGUF", "transformers folder"),
    "h5": (b"\x89HDF\r\n\x1a\n", "HDF5", ".keras"),
    "ort": (b"\x1c\0\0\0ORTM", ".ort", "ONNX it came from"),
    "safetensors": (safetensors(), "weights alone", "config.json"),
    "coreml": (COREML, "CoreML", "convert the model it was made from"),
    "openvino": (b'<?xml version="1.0"?>\n<net name="m" version="11">', "OpenVINO IR", "graphopt export"),
    "jax.export": (b"\x3c\0\0\0" + b"\0" * 296 + b"ML\xefR\rStableHLO_v1.15.1", "jax.export", "module.py:function"),
    "stablehlo": (b"ML\xefR\rStableHLO_v1.15.1", "StableHLO", "module.py:function"),
    "pmml": (b'<?xml version="1.0"?>\n<PMML version="4.4">', "PMML", "made from"),
    "npz": (npz(), "NumPy", "no model"),
    "npy": (b"\x93NUMPY\1\0", "NumPy", "no model"),
    "state dict": (state_dict(), "torch.save", "module.py:function"),
    "onnx": ((MODELS / "shared.onnx").read_bytes(), "ONNX model already", "graphopt optimize"),
    "empty": (b"", "empty", "interrupted"),
    "noise": (np.random.default_rng(0).bytes(2000), "nothing that is recognised", "--from"),
    "damaged zip": (b"PK\3\4" + b"x" * 50, "damaged zip", "again"),
    "json": (b'{"a": 1}', "no model", "JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_advice(name: str, workplace: Path) -> None:
    data, *words = REFUSED[name]
    Path("source.bin").write_bytes(data)
    with pytest.raises(InputError) as caught:
        recognise("source.bin")
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "files", "words"),
    [
        ("nope.pt2", {}, "no such file"),
        ("net.py", {"net.py": "import torch"}, "name the function"),
        ("net.py:make", {"net.py": "import torch, jax"}, "imports jax and torch; say which"),
        ("net.py:make", {"net.py": "x = 1"}, "imports neither torch nor jax"),
        ("net.py:make", {"net.py": "def f(:"}, "no Python that can be read"),
        ("d", {"d/pytorch_model.bin": "x"}, "safetensors"),
        ("d", {"d/x.safetensors": "x"}, "no config.json"),
        ("d", {"d/readme.txt": "x"}, "no SavedModel and no transformers model"),
        ("d", {"d/net.pdiparams": "x"}, "name its .pdmodel or .json"),
    ],
)
def test_usage(text: str, files: dict[str, str], words: str, workplace: Path) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    with pytest.raises(InputError, match=words):
        recognise(text)


def test_from_overrides_and_is_checked(workplace: Path) -> None:
    Path("odd.bin").write_bytes(b"\1\2\3\4")
    assert recognise("odd.bin", "tflite").kind == "tflite"
    with pytest.raises(InputError, match="did you mean 'tflite'"):
        recognise("odd.bin", "tflit")


def test_nothing_of_the_source_runs_and_no_framework_is_imported(workplace: Path) -> None:
    Path("net.py").write_text("import torch\nopen('ran', 'w')\n")
    code = (
        "import sys; from graphopt.conversion.recognise import recognise; recognise('net.py:make');"
        "print([m for m in ('torch', 'jax', 'tensorflow', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=workplace,
                          env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout == "[]\n"
    assert not Path("ran").exists()


# Hostile archives


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders there")
@pytest.mark.parametrize("verb", ["convert", "unpack"])
def test_a_pipe_is_not_waited_for(verb: str, workplace: Path) -> None:
    os.mkfifo("m.pt2")
    ran = run_cli(verb, "m.pt2", "-o", "o.onnx")
    assert ran.code == 2
    assert "m.pt2 is no regular file" in ran.error


def test_a_zip_bomb_is_not_unpacked(workplace: Path) -> None:
    archive("bomb.keras", {"config.json": b"\0" * 300_000_000, "metadata.json": b"", "model.weights.h5": b""},
            zipfile.ZIP_DEFLATED)  # fmt: skip
    with pytest.raises(InputError, match="zip bomb"):
        recognise("bomb.keras")


def test_members_that_share_their_bytes(workplace: Path) -> None:
    """The bomb whose entries overlap: each is small, together they are more than the file."""
    path = archive("o.pt2", {"a/data.pkl": b"x" * 1000})
    data = bytearray(path.read_bytes())
    start = data.find(b"PK\1\2")
    end = data.find(b"PK\5\6")
    entry = bytes(data[start:end])
    tail = bytearray(data[end:])
    tail[8:12] = (50).to_bytes(2, "little") * 2
    tail[12:16] = (50 * len(entry)).to_bytes(4, "little")
    path.write_bytes(bytes(data[:start]) + entry * 50 + bytes(tail))
    with pytest.raises(InputError, match="zip bomb"):
        recognise("o.pt2")


def test_a_member_outside(workplace: Path) -> None:
    archive("m.keras", {"config.json": b"", "metadata.json": b"", "../../evil": b""})
    with pytest.raises(InputError, match="outside of itself"):
        recognise("m.keras")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"n/data/weights/model_weights_config.json": b'{"config": {"w": {"use_pickle": true}}}'}, "pickled weights"),
        ({"n/data/sample_inputs/model.pt": pickle.dumps(print)}, "bare pickle"),
        ({"n/data/aotinductor/m/m.so": b""}, "compiled code"),
        ({"n/models/model.json": b'{"nodes": [{"target": "torch.hub.load", "inputs": []}]}'}, "torch.hub.load"),
        ({"n/models/model.json": b'{"as_expr": {"expr_str": "exec(\'1\')"}}'}, "no size"),
    ],
)
def test_exported_programs_that_would_run_code(members: dict[str, bytes], words: str, workplace: Path) -> None:
    archive("a.pt2", {**PT2, **members} if "n/models/model.json" not in members else members)
    source = recognise("a.pt2")
    with pytest.raises(InputError, match=f"{words}.*--allow-code"):
        refuse_what_runs(source, allow_pickle=False, allow_code=False)
    refuse_what_runs(source, allow_pickle=False, allow_code=True)


def test_example_inputs_that_name_something_else(workplace: Path) -> None:
    def inputs(data: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as out:
            out.writestr("x/data.pkl", data)
        return stream.getvalue()

    archive("a.pt2", {**PT2, "n/data/sample_inputs/model.pt": inputs(pickle.dumps(print, protocol=2))})
    assert "builtin" in str(what_runs(Path("a.pt2")))
    archive("a.pt2", {**PT2, "n/data/sample_inputs/model.pt": inputs(pickle.dumps(print, protocol=4))})
    assert what_runs(Path("a.pt2")) is not None
    archive("a.pt2", {**PT2, "n/data/sample_inputs/model.pt": inputs(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.")})
    assert what_runs(Path("a.pt2")) is None


def test_text_of_sizes() -> None:
    for text in ("Symbol('s77', integer=True, positive=True)", "2*s0 + 1", "FloorDiv(s0, 2) - 1", "s0", "0.5*s1"):
        assert is_size(text), text
    for text in ("exec('1')", "s0.__class__", "(lambda: 1)()", "[x for x in y]", "s0.real", "open('a')", "__import__"):
        assert not is_size(text), text


@pytest.mark.parametrize("kind", ["pickle", "torchscript"])
def test_code_needs_a_word(kind: str, workplace: Path) -> None:
    name = {"pickle": "a.pkl", "torchscript": "a.ts"}[kind]
    KEPT[name][0]()
    flag = "--allow-pickle" if kind == "pickle" else "--allow-code"
    with pytest.raises(InputError, match=flag):
        refuse_what_runs(recognise(name), allow_pickle=False, allow_code=False)
    refuse_what_runs(recognise(name), allow_pickle=True, allow_code=True)


def test_fields_of_noise_end() -> None:
    for seed in range(200):
        list(fields(np.random.default_rng(seed).bytes(seed)))


def test_every_front_end_has_its_script_and_its_extra() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for front_end in FRONT_ENDS.values():
        assert (ROOT / "graphopt" / "conversion" / "workers" / front_end.script).is_file()
        assert front_end.extra in extras
