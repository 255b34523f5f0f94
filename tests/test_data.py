"""Calibration and evaluation data: what a user hands in, and what they are told when it does not fit."""

from __future__ import annotations

import gc
import io
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from graphopt.data import (
    Dataset,
    ImageOptions,
    Sample,
    feeds,
    labels,
    legal_random,
    load_data,
    split,
    summarize,
)
from graphopt.errors import DataError, InputError
from graphopt.model import ValueSpec

F32, F16, I64, I32 = (np.dtype(t) for t in ("float32", "float16", "int64", "int32"))
IMAGE = ValueSpec("image", F32, ("batch", 1, 8, 8))
IDS = ValueSpec("ids", I64, ("batch", "sequence"))
MASK = ValueSpec("mask", I64, ("batch", "sequence"))


def pictures(n: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 1, 8, 8)).astype(np.float32)


def same(a: Sample, b: Sample) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def refused(call: Callable[[], object], *words: str, kind: type[Exception] = DataError) -> str:
    """The message: of the right class, one line, a remedy after the semicolon, with all ``words``."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message
    for word in words:
        assert word in message
    return message


def save_sets(root: Path, x: np.ndarray) -> Path:
    for i, row in enumerate(x):
        folder = root / f"test_data_set_{i}"
        folder.mkdir(parents=True)
        (folder / "input_0.pb").write_bytes(numpy_helper.from_array(row[None]).SerializeToString())
    return root


class Reader:
    """The shape of onnxruntime.quantization.CalibrationDataReader."""

    def __init__(self, x: np.ndarray) -> None:
        self._left = iter([{"image": row[None]} for row in x])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


class Tensor:
    """Quacks like a torch tensor."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self._array


class Loader:
    """Quacks like a torch DataLoader: iterable, has a length, gives (x, y)."""

    def __init__(self, x: np.ndarray, batch: int = 1) -> None:
        self._x, self._batch = x, batch

    def __len__(self) -> int:
        return len(self._x) // self._batch

    def __iter__(self) -> Iterator[list[Tensor]]:
        for i in range(0, len(self._x), self._batch):
            y = np.arange(i, i + self._batch)
            yield [Tensor(self._x[i : i + self._batch]), Tensor(y)]


def ways(tmp: Path) -> dict[str, Any]:
    """The same 8 samples in every way they can be given."""
    x = pictures()
    np.savez(tmp / "plain.npz", image=x)
    np.savez_compressed(tmp / "small.npz", image=x)
    np.savez(tmp / "fortran.npz", image=np.asfortranarray(x))
    np.savez_compressed(tmp / "fortran small.npz", image=np.asfortranarray(x))
    np.savez(tmp / "members.npz", **{f"image/{i}": row[None] for i, row in enumerate(x)})
    np.savez(tmp / "unnamed.npz", x)
    np.save(tmp / "校准 数据.npy", x)
    for name in ("one npz each", "four npz each", "npy", "npy no batch", "per input/image"):
        (tmp / name).mkdir(parents=True)
    for i, row in enumerate(x):
        np.savez(tmp / f"one npz each/{i}.npz", image=row[None])
        np.save(tmp / f"npy/{i}.npy", row[None])
        np.save(tmp / f"npy no batch/{i}.npy", row)
        np.save(tmp / f"per input/image/{i}.npy", row[None])
    np.savez(tmp / "four npz each/a.npz", image=x[:4])
    np.savez(tmp / "four npz each/b.npz", image=x[4:])
    (tmp / "加载 loader.py").write_text(
        "import numpy as np\n"
        f"def load_data():\n    for row in np.load({str(tmp / '校准 数据.npy')!r}):\n"
        "        yield {'image': row[None]}\n"
        "def tuples():\n    return ((s['image'],) for s in load_data())\n",
        encoding="utf-8",
    )
    folders = ("one npz each", "four npz each", "npy", "npy no batch", "per input")
    files = ("plain", "small", "fortran", "fortran small", "members", "unnamed")
    return {
        **{name: tmp / f"{name}.npz" for name in files},
        **{name: str(tmp / name) for name in folders},
        "npy file": tmp / "校准 数据.npy",
        "test data sets": save_sets(tmp / "sets", x),
        "generator": str(tmp / "加载 loader.py"),
        "named generator": f"{tmp / '加载 loader.py'}:tuples",
        "dict": {"image": x},
        "dict of lists": {"image": [row[None] for row in x]},
        "array": x,
        "list of dicts": [{"image": row[None]} for row in x],
        "list of arrays": [row[None] for row in x],
        "tuples without batch": [(row,) for row in x],
        "iterator": iter([row[None] for row in x]),
        "data reader": Reader(x),
        "tensors": ({"image": Tensor(row[None])} for row in x),
    }


def test_the_same_samples_given_in_every_way_are_identical(tmp_path: Path) -> None:
    reference = [{"image": row[None]} for row in pictures()]
    digests = set()
    given = ways(tmp_path)
    assert len(given) >= 7
    for name, spec in given.items():
        data = load_data(spec, [IMAGE])
        assert len(data) == 8, name
        for _ in range(2):  # every source can be read again
            assert all(same(a, b) for a, b in zip(data, reference, strict=True)), name
        back = data.subset([7, 0, 3, 3])  # and in any order
        assert all(same(a, reference[i]) for a, i in zip(back, [7, 0, 3, 3], strict=True)), name
        assert not data.synthetic
        digests.add(data.digest)
    assert len(digests) == 1


def test_a_changed_number_or_order_changes_the_digest() -> None:
    x = pictures()
    data = load_data(x, [IMAGE])
    assert data.digest == data.take(100).digest
    assert data.digest != data.subset(list(range(7, -1, -1))).digest
    x = x.copy()
    x[3, 0, 0, 0] += 1
    assert load_data(x, [IMAGE]).digest != data.digest


# --- shapes, labels


def test_keys_that_are_no_input_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, image=pictures(), label=np.arange(8), names=np.array(["a", "b"]))
    data = load_data(path, [IMAGE])
    assert [labels(s, [IMAGE])["label"].tolist() for s in data] == [[i] for i in range(8)]
    assert all(list(feeds(s, [IMAGE])) == ["image"] for s in data)
    summary = summarize(data, [IMAGE])
    assert summary.labels == ("label",)
    assert any("'names'" in note and "left out" in note for note in summary.notes)


def test_a_loader_keeps_its_batches_and_gives_labels() -> None:
    data = load_data(Loader(pictures(), batch=4), [IMAGE])
    assert [s["image"].shape for s in data] == [(4, 1, 8, 8)] * 2
    assert [s["label"].tolist() for s in data] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    item = (pictures(1), np.array([1]), np.array([2.0]))
    assert sorted(next(iter(load_data([item], [IMAGE])))) == ["image", "label", "label_1"]
    nested = ({"image": pictures(1)}, np.array([1]))
    assert sorted(next(iter(load_data([nested], [IMAGE])))) == ["image", "label"]


def test_samples_of_different_shapes(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    arrays = {f"ids/{i}": np.ones((1, i + 1), np.int64) for i in range(12)}
    np.savez(path, **arrays, **{f"mask/{i}": a for i, a in enumerate(arrays.values())})
    data = load_data(path, [IDS, MASK])
    assert [s["ids"].shape[1] for s in data] == list(range(1, 13))  # 10 after 9, not after 1
    assert len(summarize(data, [IDS, MASK]).inputs[0].shapes) == 12


def test_a_folder_whose_files_are_single_samples_of_unlike_inputs(tmp_path: Path) -> None:
    boxes = ValueSpec("boxes", F32, ("boxes", 4))
    for i in range(3):
        np.savez(tmp_path / f"s{i}.npz", image=pictures(1), boxes=np.ones((i + 2, 4), np.float32))
    data = load_data(tmp_path, [IMAGE, boxes])
    assert [s["boxes"].shape for s in data] == [(2, 4), (3, 4), (4, 4)]
    assert data.sample_name(1) == f"{tmp_path.name}/s1.npz"


def test_a_model_with_a_fixed_batch_takes_that_many_rows() -> None:
    four = ValueSpec("image", F32, (4, 1, 8, 8))
    data = load_data({"image": pictures(), "y": np.arange(8)}, [four])
    assert [s["image"].shape for s in data] == [(4, 1, 8, 8)] * 2
    assert [s["y"].tolist() for s in data] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    refused(lambda: load_data({"image": pictures(6)}, [four]), "6 rows", "'image'", "multiple of 4")


def test_one_subfolder_per_input_pairs_files_by_name(tmp_path: Path) -> None:
    for name in ("ids", "mask"):
        (tmp_path / name).mkdir()
        for i in range(11):
            np.save(tmp_path / name / f"{i}.npy", np.full((1, 3), i))
    data = load_data(tmp_path, [IDS, MASK])
    assert [int(s["mask"][0, 0]) for s in data] == list(range(11))
    (tmp_path / "mask/4.npy").unlink()
    refused(lambda: load_data(tmp_path, [IDS, MASK]), "'4'", "'mask'")


def test_strings_and_scalars() -> None:
    text, scalar = ValueSpec("text", np.dtype(object), ("n", 1)), ValueSpec("k", F32, ())
    data = load_data([{"text": [["é"]], "k": 2.5}, {"text": np.array([["b"]]), "k": np.float64(1)}], [text, scalar])
    first = feeds(next(iter(data)), [text, scalar])
    assert first["text"].dtype == object
    assert first["text"].tolist() == [["é"]]
    assert first["k"].shape == ()
    again = load_data(iter([{"text": np.array([["é"]], object), "k": np.float64(2.5)}]), [text, scalar])
    assert feeds(next(iter(again)), [text, scalar])["text"].tolist() == [["é"]]
    assert summarize(data, [text, scalar]).inputs[0].minimum is None


# --- what is refused


def test_a_wrong_name_gets_a_hint(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **{"Input-Image.1": pictures()})
    spec = ValueSpec("input_image_1", F32, ("batch", 1, 8, 8))
    refused(
        lambda: load_data(tmp_path / "d.npz", [spec]), "'d.npz'", "'Input-Image.1'", "did you mean 'input_image_1'?"
    )
    refused(lambda: list(load_data([{"IMAGE": pictures(1)}], [IMAGE])), "did you mean 'image'?", "list[0]")
    refused(lambda: load_data({"other": pictures()}, [IMAGE]), "'image'", "'other'")


@pytest.mark.parametrize(
    ("array", "spec", "words"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), IMAGE, ["3 channels", "wants 1", "float32[batch,1,8,8]"]),
        (np.zeros((1, 8, 8, 1), np.float32), IMAGE, ["looks NHWC", "transpose"]),
        (np.zeros((1, 1, 1, 8, 8), np.float32), IMAGE, ["rank 5", "batch dimension"]),
        (np.zeros((1, 1, 8, 8), np.uint8), IMAGE, ["uint8", "scale"]),
        (np.zeros((1, 4), np.float32), IDS, ["float32", "int64[batch,sequence]"]),
        (np.array([["a"]]), IDS, ["string"]),
        (np.full((1, 2), 2**40), ValueSpec("ids", I32, (1, 2)), ["int64", "int32 cannot hold"]),
        (np.full((1, 2), -1, np.int64), ValueSpec("ids", np.dtype("uint64"), (1, 2)), ["cannot hold"]),
        (np.full((1, 2), 1e10, np.float32), ValueSpec("ids", F16, (1, 2)), ["too large for float16"]),
    ],
)
def test_data_that_do_not_fit_are_refused_with_the_fix(array: np.ndarray, spec: ValueSpec, words: list[str]) -> None:
    good = {spec.name: array}
    message = refused(lambda: feeds(good, [spec]), f"'{spec.name}'", *words)
    assert "the sample" in message
    data = load_data([good], [spec])
    refused(lambda: summarize(data, [spec]), "sample 'list[0]'", f"'{spec.name}'", *words)


def test_casts_that_change_nothing_are_made_and_noted_once() -> None:
    data = load_data({"image": pictures().astype(np.float64)}, [IMAGE])
    assert feeds(next(iter(data)), [IMAGE])["image"].dtype == F32
    assert [n for n in summarize(data, [IMAGE]).notes if "float64" in n and "float32" in n] == [
        "input 'image': float64 data is cast to float32"
    ]
    ids = feeds({"ids": np.array([[1, 2]], ">i4")}, [IDS])["ids"]
    assert ids.dtype == I64
    assert ids.tolist() == [[1, 2]]
    turned = feeds({"image": pictures().transpose(0, 1, 3, 2)}, [IMAGE])["image"]
    assert turned.flags.c_contiguous


def test_bfloat16_saved_by_numpy_comes_back(tmp_path: Path) -> None:
    bf16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    spec = ValueSpec("image", bf16, ("batch", 1, 8, 8))
    np.save(tmp_path / "d.npy", pictures().astype(bf16))
    data = load_data(tmp_path / "d.npy", [spec])
    got = np.concatenate([feeds(s, [spec])["image"] for s in data])
    assert got.tobytes() == pictures().astype(bf16).tobytes()
    assert summarize(load_data(pictures(), [spec]), [spec]).inputs[0].minimum is not None


def test_one_symbol_has_one_size() -> None:
    data = load_data([{"ids": np.ones((1, 3), np.int64), "mask": np.ones((1, 4), np.int64)}], [IDS, MASK])
    refused(lambda: summarize(data, [IDS, MASK]), "sequence=4", "'mask'", "sequence=3", "'ids'")


def test_nan_and_empty_samples_are_skipped_by_name() -> None:
    x = pictures()
    x[2, 0, 0, 0] = np.nan
    x[5] = np.inf
    items = [row[None] for row in x] + [np.zeros((0, 1, 8, 8), np.float32)]
    data = load_data(items, [IMAGE])
    summary = summarize(data, [IMAGE])
    assert [(s.sample, s.input) for s in summary.skipped] == [(f"list[{i}]", "image") for i in (2, 5, 8)]
    assert "1 NaN" in summary.skipped[0].reason
    assert "empty" in summary.skipped[2].reason
    assert summary.kept == (0, 1, 3, 4, 6, 7)
    usable = x[list(summary.kept)]
    assert (summary.inputs[0].minimum, summary.inputs[0].maximum) == (usable.min(), usable.max())
    assert not summarize(data.subset(summary.kept), [IMAGE]).skipped
    refused(lambda: summarize(data.subset([5, 2]), [IMAGE]), "none of the 2", "'list[5]'", "'image'")


def test_unequal_counts_are_named() -> None:
    data = {"ids": np.ones((3, 2), np.int64), "mask": np.ones((4, 2), np.int64)}
    refused(lambda: load_data(data, [IDS, MASK]), "3 of 'ids'", "4 of 'mask'")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no such.npz", ["no such.npz"]),
        ("no such.py:f", ["no such.py"]),
        ("random:0", ["random:8"]),
        ("random:many", ["random:8"]),
        (7, ["int"]),
    ],
)
def test_a_spec_nobody_can_read(spec: object, words: list[str]) -> None:
    refused(lambda: load_data(spec, [IMAGE]), *words, kind=InputError)


def test_folders_with_nothing_or_too_much(tmp_path: Path) -> None:
    refused(lambda: load_data(tmp_path, [IMAGE]), tmp_path.name, kind=InputError)
    np.save(tmp_path / "a.npy", pictures(1))
    refused(lambda: load_data(tmp_path, [IDS, MASK]), "'ids'", "'mask'")
    np.savez(tmp_path / "a.npz", image=pictures(1))
    refused(lambda: load_data(tmp_path, [IMAGE]), "both", kind=InputError)
    refused(lambda: load_data([], [IMAGE]), "no samples")
    refused(lambda: load_data(pictures(), []), "no inputs", kind=InputError)


# --- broken and hostile files


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "raw",
    [
        header("(1000000, 1, 1000, 1000)"),
        header("(-8, 1, 8, 8)"),
        header("(99999999999999999999, 1, 8, 8)"),
        header("(8, 1, 8, 8)", "'|O'"),
        header("(8, 1, 8, 8)", "[('a', '<f4')]"),
        header("__import__('os')"),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{" * 64,
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 40_000_000) + b" " * 40_000_000,
        b"\x93NUMPY\x03\x00" + bytes(64),
        b"\x93NUMPY",
        b"",
        b"not an array at all",
    ],
)
@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_hostile_array_is_refused_without_being_allocated(tmp_path: Path, raw: bytes, packed: int | None) -> None:
    path = tmp_path / ("d.npy" if packed is None else "d.npz")
    if packed is None:
        path.write_bytes(raw)
    else:
        with zipfile.ZipFile(path, "w", packed) as archive:
            archive.writestr("image.npy", raw)
    tracemalloc.start()
    try:
        refused(lambda: load_data(path, [IMAGE]), path.name)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    ragged = np.empty(2, object)
    ragged[:] = [np.ones(2), np.ones(3)]
    np.savez(tmp_path / "d.npz", image=ragged)
    refused(lambda: load_data(tmp_path / "d.npz", [IMAGE]), "Python objects", "'<input>/<index>'")
    refused(lambda: load_data({"image": ragged}, [IMAGE]), "'image'")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_one_line(tmp_path: Path, save: Any) -> None:
    whole = io.BytesIO()
    save(whole, image=pictures())
    raw, path = whole.getvalue(), tmp_path / "d.npz"
    for cut in range(0, len(raw), max(len(raw) // 25, 1)):
        path.write_bytes(raw[:cut])
        refused(lambda: list(load_data(path, [IMAGE])), "d.npz")
    damaged = bytearray(raw)
    middle = len(raw) // 2
    damaged[middle : middle + 8] = bytes(b ^ 0xFF for b in damaged[middle : middle + 8])
    path.write_bytes(damaged)
    refused(lambda: list(load_data(path, [IMAGE])), "d.npz")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bytes_never_raise_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, image=pictures(2))
    raw = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "d.npz"
    path.write_bytes(raw)
    with suppress(DataError):
        summarize(load_data(path, [IMAGE]), [IMAGE])


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "d.npy"
    np.save(path, pictures())
    data = load_data(path, [IMAGE])
    path.write_bytes(path.read_bytes()[:-10])
    refused(lambda: list(data), "d.npy", "early")
    path.unlink()
    refused(lambda: list(data), "d.npy")


def test_broken_test_data(tmp_path: Path) -> None:
    folder = save_sets(tmp_path / "m", pictures(1)) / "test_data_set_0"
    assert load_data(folder, [IMAGE]).sample_name(0) == "m/test_data_set_0"
    two = [IMAGE, ValueSpec("k", F32, ())]
    refused(lambda: list(load_data(folder, two)), "test_data_set_0", "'k'", "input_1.pb")
    (folder / "input_0.pb").write_bytes(b"\xff" * 40)
    refused(lambda: list(load_data(folder, [IMAGE])), "input_0.pb")
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    refused(lambda: list(load_data(folder, [IMAGE])), "another file")


def test_test_data_are_matched_by_name_where_they_have_one(tmp_path: Path) -> None:
    for i, name in enumerate(("mask", "ids")):
        raw = numpy_helper.from_array(np.full((1, 2), i), name).SerializeToString()
        (tmp_path / f"input_{i}.pb").write_bytes(raw)
    sample = next(iter(load_data(tmp_path, [IDS, MASK])))
    assert (sample["mask"][0, 0], sample["ids"][0, 0]) == (0, 1)


# --- memory, spools


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_large_file_is_never_in_memory(tmp_path: Path, packed: int) -> None:
    rows, path = 50, tmp_path / "big.npz"
    row = np.zeros((1, 1024, 1024), np.float32)
    with (
        zipfile.ZipFile(path, "w", packed, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(
            member, {"descr": "<f4", "fortran_order": False, "shape": (rows, *row.shape)}
        )
        for i in range(rows):
            row[0, 0, 0] = i
            member.write(row.tobytes())
    spec = ValueSpec("x", F32, ("n", 1, 1024, 1024))
    del row
    tracemalloc.start()
    try:
        data = load_data(path, [spec])
        assert [int(s["x"][0, 0, 0, 0]) for s in data] == list(range(rows))
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


MEASURE = """
import resource, sys
import numpy as np
from graphopt.data import load_data
from graphopt.model import ValueSpec
spec = ValueSpec("x", np.dtype("float32"), ("n", 1, 1024, 1024))
data = load_data(sys.argv[1], [spec])
assert len(list(data.take(1))) == 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(1 for _ in data) == 50
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown // 1024 if sys.platform == "darwin" else grown)
"""


def test_resident_memory_stays_small(tmp_path: Path) -> None:
    """In a process of its own: the peak of this one says nothing. A map kept open would count 200 MB here."""
    pytest.importorskip("resource")
    path = tmp_path / "big.npz"
    np.savez(path, x=np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (50, 1, 1024, 1024), (0, 0, 0, 0)))
    assert path.stat().st_size > 200e6
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(done.stdout) < 40_000  # KiB


def spools(folder: Path) -> list[Path]:
    return sorted(folder.glob("graphopt-spool-*"))


def test_a_generator_is_spooled_once_and_the_spool_goes_with_the_dataset(tmp_path: Path) -> None:
    pulled = []

    def generate() -> Iterator[np.ndarray]:
        for i, row in enumerate(pictures()):
            pulled.append(i)
            yield row[None]

    data: Dataset | None = load_data(generate(), [IMAGE], spool_dir=tmp_path)
    assert data is not None
    assert len(data) == len(list(data)) == len(list(data)) == 8
    assert pulled == list(range(8))
    assert len(spools(tmp_path)) == 1
    part = data.subset([1])
    data = None
    gc.collect()
    assert len(list(part)) == 1  # still needed
    del part
    gc.collect()
    assert not spools(tmp_path)


def test_limit_ends_an_endless_generator_and_the_cap_another(tmp_path: Path) -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            yield pictures(1)

    assert len(load_data(endless(), [IMAGE], limit=5, spool_dir=tmp_path)) == 5
    gc.collect()
    refused(
        lambda: load_data(endless(), [IMAGE], spool_dir=tmp_path, spool_limit=10_000), "temporary space", "spool_limit"
    )
    gc.collect()
    assert not spools(tmp_path)


def test_a_compressed_file_is_decompressed_to_disk_only_when_read_out_of_order(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", image=pictures())
    room = tmp_path / "room"
    data = load_data(tmp_path / "d.npz", [IMAGE], spool_dir=room)
    assert len(list(data)) == 8
    assert not room.exists()
    for _ in range(2):
        assert len(list(data.subset([3, 1]))) == 2
    assert len(list(room.glob("*/*"))) == 1
    del data
    gc.collect()
    assert not list(room.iterdir())


def test_errors_of_a_users_own_code_name_its_line(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent(
            """
            import numpy as np
            from neighbour import SHAPE
            def load_data():
                yield np.zeros(SHAPE, np.float32)
                raise ValueError("two\\nlines")
            def nothing():
                pass
            def leave():
                raise SystemExit(0)
            class Reader:
                def __init__(self):
                    self.left = 2
                def get_next(self):
                    self.left -= 1
                    return {"image": np.zeros(SHAPE, np.float32)} if self.left >= 0 else None
            """
        )
    )
    (tmp_path / "neighbour.py").write_text("SHAPE = (1, 1, 8, 8)\n")
    refused(lambda: load_data(script, [IMAGE]), "mine.py:load_data", "ValueError: two lines", "mine.py line 6")
    refused(lambda: load_data(f"{script}:nothing", [IMAGE]), "nothing")
    refused(lambda: load_data(f"{script}:leave", [IMAGE]), "SystemExit")
    refused(lambda: load_data(f"{script}:absent", [IMAGE]), "'absent'", "nothing", kind=InputError)
    data = load_data(f"{script}:Reader", [IMAGE])
    assert len(data) == 2
    assert data.sample_name(1) == "mine.py:Reader[1]"


# --- images, random, split


def test_images_are_prepared_as_declared(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, value in (("cat", 255), ("狗 dog", 0)):
        (tmp_path / name).mkdir()
        image.new("RGB", (20, 10), (value, 0, 0)).save(tmp_path / name / "1.png")
    spec = ValueSpec("x", F32, ("n", 3, 8, 8))
    options = ImageOptions(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    refused(lambda: load_data(tmp_path, [spec]), "ImageOptions", kind=InputError)
    data = load_data(tmp_path, [spec], image=options)
    samples = list(data)
    assert [s["label"].tolist() for s in samples] == [[0], [1]]
    assert np.array_equal(samples[0]["x"][0, :, 0, 0], np.array([1, -1, -1], np.float32))
    assert data.sample_name(0) == f"{tmp_path.name}/cat/1.png"
    bgr = load_data(tmp_path / "cat", [spec], image=ImageOptions(size=(8, 8), order="BGR", fit="crop"))
    assert next(iter(bgr))["x"][0, :, 0, 0].tolist() == [0, 0, 1]
    raw = ValueSpec("x", np.dtype(np.uint8), ("n", 8, 8, 1))
    grey = load_data(tmp_path, [raw], image=ImageOptions(size=8, scale=1, layout="NHWC", order="L"))
    assert feeds(next(iter(grey)), [raw])["x"][0, 0, 0, 0] == 76
    refused(lambda: load_data(tmp_path, [raw], image=options), "integers", kind=InputError)
    (tmp_path / "cat/1.png").write_bytes(b"no png")
    refused(lambda: list(data), "cat/1.png")


def test_images_without_pillow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    options = ImageOptions(size=8)
    call = lambda: load_data(tmp_path, [IMAGE], image=options)  # noqa: E731
    refused(call, 'pip install "graphopt[image]"', kind=InputError)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 8, "std": (0.0,)}, {"size": 8, "mean": (0.0, 1.0)}])
def test_image_options_that_make_no_sense(options: dict[str, Any]) -> None:
    refused(lambda: ImageOptions(**options), "image", kind=InputError)


def test_random_data_only_when_spelled_so_and_never_unsaid() -> None:
    bf16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    inputs = [IMAGE, IDS, MASK, ValueSpec("half", bf16, (2,)), ValueSpec("on", np.dtype(bool), ("batch",))]
    data = load_data("random:5", inputs, seed=3)
    assert data.synthetic
    assert len(data) == 5
    assert len(load_data("random", inputs)) == 8
    for sample in data:
        assert sample["ids"].shape == sample["mask"].shape == (1, 8)
        assert 0 <= sample["ids"].min() <= sample["ids"].max() < 10
        assert feeds(sample, inputs)
    assert data.digest == legal_random(inputs, 3, 5).digest != legal_random(inputs, 4, 5).digest
    assert summarize(data, inputs).synthetic
    bounded = next(iter(legal_random(inputs, bounds={"image": (2, 3), "ids": (7, 7)})))
    assert bounded["image"].min() >= 2
    assert set(bounded["ids"].ravel()) == {7}
    refused(lambda: load_data("random", [ValueSpec("x", F32, None)]), "'x'", kind=InputError)
    refused(lambda: legal_random(inputs, bounds={"no": (0, 1)}), "'no'", kind=InputError)


def test_split_holds_back_a_seeded_share() -> None:
    data = load_data({"image": pictures(50)}, [IMAGE])
    rest, held, note = split(data, seed=1)
    assert (len(rest), len(held)) == (40, 10)
    assert "10 of 50" in note
    everything = sorted(rest.sample_name(i) for i in range(40)) + sorted(held.sample_name(i) for i in range(10))
    assert len(set(everything)) == 50
    assert split(data, seed=1)[1].digest == held.digest != split(data, seed=2)[1].digest
    few = data.take(39)
    rest, held, note = split(few)
    assert rest is held is few
    assert "calibration samples judge" in note


def test_out_of_range_is_refused() -> None:
    data = load_data(pictures(), [IMAGE])
    refused(lambda: data.subset([8]), "sample 8", kind=InputError)
    refused(lambda: data.take(-1), "-1", kind=InputError)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.data(),
    st.sampled_from(["float32", "float16", "int64", "uint8", "bool", "complex64", "float64"]),
    st.booleans(),
    st.booleans(),
)
def test_npz_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, small: bool, fortran: bool
) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    array = data.draw(hnp.arrays(dtype, shape))
    name = data.draw(st.sampled_from(["x", "输入 1", "a/b:0", "file", "x.y", "x/3"]))
    path = tmp_path_factory.mktemp("round") / "d.npz"
    kind = zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive, archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, np.asfortranarray(array) if fortran else array)
    spec = ValueSpec(name, np.dtype(dtype), ("n", *shape[1:]))
    loaded = load_data(path, [spec])
    assert len(loaded) == shape[0]
    order = data.draw(st.permutations(range(shape[0])))
    got = [feeds(sample, [spec])[name] for sample in loaded.subset(order)]
    assert np.concatenate(got).tobytes() == np.ascontiguousarray(array[list(order)]).tobytes()
    assert all(g.flags.writeable for g in got)
