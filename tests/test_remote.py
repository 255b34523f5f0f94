"""Addresses: models and data read from them, outputs written to them; in memory and as ``file://``, no network."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO, MODELS, run_cli

import graphopt
from graphopt import remote
from graphopt.model import load
from graphopt.storage import save

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory() -> Iterator[Any]:
    """The files behind ``memory://``, empty."""
    system = fsspec.filesystem("memory")

    def clear() -> None:
        system.store.clear()
        system.pseudo_dirs[:] = [""]

    clear()
    yield system
    clear()


def put(system: Any, name: str, data: bytes) -> str:
    system.pipe_file(f"/{name}", data)
    return f"memory://{name}"


def names(system: Any) -> list[str]:
    return sorted(name.lstrip("/") for name in system.store)


def test_a_verb_from_address_to_address(memory: Any, workplace: Path) -> None:
    model = put(memory, "in/digits.onnx", (DEMO / "digits.onnx").read_bytes())
    data = put(memory, "in/data.npz", (DEMO / "evaluation.npz").read_bytes())
    words = ("--data", data, "--metric", "accuracy", "--time", "0", "--allow-slower", "--samples", "80")
    ran = run_cli("quantize", model, "-o", "memory://out/int8.onnx", *words, "--json", "--junit", "memory://out/g.xml")
    assert ran.code == 0, ran.err
    report = ran.json
    assert (report["input"]["path"], report["output"]["path"]) == (model, "memory://out/int8.onnx")
    assert report["data"]["source"] == data
    assert report["input"]["sha256"] == graphopt.optimize(DEMO / "digits.onnx", time=0).report["input"]["sha256"]
    assert names(memory) == ["in/data.npz", "in/digits.onnx", "out/g.xml", "out/int8.onnx"]
    written = memory.cat_file("/out/int8.onnx")
    assert report["output"]["bytes"] == len(written)
    assert "QuantizeLinear" in {node.op_type for node in onnx.ModelProto.FromString(written).graph.node}
    assert run_cli("compare", model, "memory://out/int8.onnx", "--data", data, "--samples", "9").code == 0
    assert json.loads(run_cli("inspect", model, "--json").out)["path"] == model
    assert run_cli("diff", model, model).code == 0


def test_a_model_is_read_again_where_it_has_changed(memory: Any) -> None:
    address = put(memory, "m.onnx", (MODELS / "shared.onnx").read_bytes())
    first = len(load(address).graph)
    put(memory, "m.onnx", (DEMO / "digits.onnx").read_bytes())
    assert len(load(address).graph) == len(load(DEMO / "digits.onnx").graph) != first


def test_in_place(memory: Any, workplace: Path) -> None:
    address = put(memory, "m.onnx", (DEMO / "digits.onnx").read_bytes())
    assert run_cli("optimize", address, "-o", address, "--time", "0", "-q").code == 0
    assert len(load(address).graph) < len(load(DEMO / "digits.onnx").graph)


def test_weights_in_a_data_file(memory: Any, workplace: Path) -> None:
    files = save(load(DEMO / "digits.onnx"), "memory://a/m.onnx", external=True)
    assert names(memory) == sorted(f"a/{file.name}" for file in files)
    assert len(files) == 2
    ran = run_cli("optimize", "memory://a/m.onnx", "-o", "memory://b/o.onnx", "--time", "0", "--json")
    assert ran.code == 0, ran.err
    assert len([n for n in names(memory) if n.startswith("b/")]) == 2
    weights = [value.const_value.numpy() for value in load("memory://b/o.onnx").graph.initializers.values()]
    assert sum(w.size for w in weights) > 1000
    assert run_cli("inspect", "memory://a/m.onnx", "--deep").code == 0
    data = next(n for n in names(memory) if n.startswith("a/") and n.endswith(".data"))
    memory.rm_file(f"/{data}")
    ran = run_cli("optimize", "memory://a/m.onnx", "-o", "o.onnx")
    assert ran.code == 2
    assert f"no such file: memory://{data}" in ran.error


def test_data_that_leads_out_is_not_brought(memory: Any, workplace: Path) -> None:
    put(memory, "secret.bin", b"x" * 4096)
    save(load(DEMO / "digits.onnx"), "memory://a/m.onnx", external=True)
    proto = onnx.ModelProto.FromString(memory.cat_file("/a/m.onnx"))
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.bin"
    address = put(memory, "a/evil.onnx", proto.SerializeToString())
    assert "outside the model's folder" in run_cli("optimize", address, "-o", "o.onnx").error
    assert not Path("o.onnx").exists()


def test_a_folder_of_data(memory: Any, workplace: Path) -> None:
    images = np.load(DEMO / "calibration.npz")["image"]
    for index in range(12):
        stream = io.BytesIO()
        np.save(stream, images[index])
        put(memory, f"samples/{index:02}.npy", stream.getvalue())
    ran = run_cli("compare", DEMO / "digits.onnx", DEMO / "digits.onnx", "--data", "memory://samples", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["comparison"]["samples"] == 12


def test_nothing_is_there_unless_it_is_whole(memory: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = put(memory, "out/m.onnx", b"what was there before")

    def breaks(*_: object) -> None:
        raise OSError("the line is dead")

    monkeypatch.setattr(remote.shutil, "copyfileobj", breaks)
    ran = run_cli("optimize", DEMO / "digits.onnx", "-o", before, "--time", "0", "-q")
    assert ran.code == 2
    assert ran.error == f"error: cannot write {before}: the line is dead; check the address and your credentials"
    assert memory.cat_file("/out/m.onnx") == b"what was there before"
    assert names(memory) == ["out/m.onnx"]


def test_a_gate_that_fails_sends_nothing(memory: Any, workplace: Path) -> None:
    ran = run_cli("optimize", DEMO / "digits.onnx", "-o", "memory://o.onnx", "--time", "0", "-q", "--max-size", "1kB")
    assert ran.code == 1
    assert names(memory) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "memory://nope.onnx"], "no such file: memory://nope.onnx; check the address"),
        (["inspect", "nosuch://a/m.onnx"], "nothing knows nosuch:// addresses"),
        (["optimize", "memory://a.py", "-o", "o.onnx"], "no such file: memory://a.py"),
        (["compare", "D", "D", "--data", "memory://a.py:f"], "code is run from a file here only"),
        (["convert", "memory://net.py:make", "-o", "m.onnx"], "code is run from a file here only"),
        (["optimize", "D", "-o", "o.onnx", "--lock", "memory://graphopt.lock"], "a lock names files as seen"),
    ],
)
def test_one_line(words: list[str], told: str, memory: Any, workplace: Path) -> None:
    ran = run_cli(*[str(DEMO / "digits.onnx") if word == "D" else word for word in words])
    assert ran.code == 2
    assert told in ran.error
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "lacking"),
    [
        ("s3://b/m.onnx", "'graphopt[remote]' s3fs"),
        ("gs://b/m.onnx", "'graphopt[remote]' gcsfs"),
        ("hf://user/repo/m.onnx", "'graphopt[remote]' huggingface_hub"),
        ("memory://m.onnx", "'graphopt[remote]'"),
    ],
)
def test_what_is_missing_is_told_before_the_work(
    address: str, lacking: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    for words in (["inspect", address], ["optimize", str(DEMO / "digits.onnx"), "-o", address]):
        ran = run_cli(*words)
        assert ran.code == 2
        assert ran.error.endswith(f": pip install {lacking}")


def test_file_addresses_need_no_package(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    source = (DEMO / "digits.onnx").as_uri()
    folder = workplace.as_uri()
    ran = run_cli(
        "optimize", source, "-o", f"{folder}/o.onnx", "--time", "0", "--data", (DEMO / "calibration.npz").as_uri()
    )
    assert ran.code == 0, ran.err
    assert [p.name for p in workplace.iterdir()] == ["o.onnx"]


def test_a_recipe_names_addresses(memory: Any, workplace: Path) -> None:
    put(memory, "digits.onnx", (DEMO / "digits.onnx").read_bytes())
    Path("r.toml").write_text(
        'model = "memory://digits.onnx"\noutput = "memory://o.onnx"\n[[pass]]\nuse = "fuse-batchnorm"\n'
    )
    assert run_cli("run", "r.toml", "-q", "--time", "0", "--lock", "graphopt.lock").code == 0
    first = memory.cat_file("/o.onnx")
    memory.rm_file("/o.onnx")
    assert run_cli("run", "--locked", "graphopt.lock", "-q").code == 0
    assert memory.cat_file("/o.onnx") == first


def test_a_package_there_and_back(memory: Any, workplace: Path) -> None:
    address = put(memory, "digits.onnx", (DEMO / "digits.onnx").read_bytes())
    ran = run_cli("compress", address, "-o", "memory://p/digits.gopt", "--weights", "keep", "--package", "-q")
    assert ran.code == 0, ran.err
    ran = run_cli("unpack", "memory://p/digits.gopt", "-o", "memory://q/m.onnx", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["files"] == ["memory://q/m.onnx"]
    assert memory.cat_file("/q/m.onnx") == (DEMO / "digits.onnx").read_bytes()


def test_places() -> None:
    assert remote.place("a/b.onnx") == Path("a/b.onnx")
    assert remote.place("C:/b.onnx") == Path("C:/b.onnx")
    assert remote.place("s3://b/x/m.onnx").name == "m.onnx"
    assert remote.place("s3://b/x/m.onnx").parent == remote.place("s3://b/x/w.data").parent
    assert remote.place("s3://b/x/m.onnx") != remote.place("s3://b/y/m.onnx")
    assert remote.place("http://h/m.onnx?key=1").name == "m.onnx_key_1"
    assert remote.with_suffix("s3://b/x.y/m.xml", ".bin") == "s3://b/x.y/m.bin"
