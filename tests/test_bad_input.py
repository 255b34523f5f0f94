"""Bad input: one clear line, the right exit code, nothing written, for every kind of it and more than one verb."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DATA, DEMO, MODELS, Ran, run_cli, run_process

Watch = Callable[[Path], AbstractContextManager[None]]
GOOD = MODELS / "shared.onnx"
"""image float32 [batch, 8, 8, 8] -> features [batch, 8]"""
GOOD_DATA = DATA / "shared.npz"


def write(name: str, content: bytes | str) -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def failed(code: int, fragment: str, *arguments: str | Path, watch: Watch) -> Ran:
    """Run, and hold the failure to its code, its one line, and to have written nothing."""
    with watch(Path.cwd().parent):
        ran = run_cli(*arguments)
    assert ran.code == code, ran.err
    assert fragment in ran.error
    assert code != 2 or ran.out == ""
    return ran


# Models


def truncated(length: int) -> Callable[[], Path]:
    return lambda: write("m.onnx", GOOD.read_bytes()[:length])


def random_bytes(seed: int) -> Callable[[], Path]:
    return lambda: write("m.onnx", np.random.default_rng(seed).bytes(4096))


def a_zip() -> Path:
    with zipfile.ZipFile("m.onnx", "w") as archive:
        archive.writestr("data.pkl", b"x")
    return Path("m.onnx")


def a_folder() -> Path:
    Path("m.onnx").mkdir()
    return Path("m.onnx")


def a_fifo() -> Path:
    os.mkfifo("m.onnx")
    return Path("m.onnx")


def external(location: str, **entries: str) -> Callable[[], Path]:
    """A model whose first large weight stands in ``location``."""

    def make() -> Path:
        model = onnx.load(GOOD)
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        write("real.bin", tensor.raw_data)
        write("../outside.bin", tensor.raw_data)
        Path("link.bin").symlink_to("../outside.bin")
        where = location.replace("HERE", str(Path.cwd()))
        for key, value in {"location": where, **entries}.items():
            tensor.external_data.add(key=key, value=value)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        return write("m.onnx", model.SerializeToString())

    return make


NOT_ONNX = "is not an ONNX model"
SIZE = GOOD.stat().st_size

UNREADABLE: dict[str, tuple[Callable[[], Path], str]] = {
    **{f"truncated-{n}": (truncated(n), NOT_ONNX) for n in (1, 2, 10, 100, SIZE // 2, SIZE - 1)},
    **{f"random-bytes-{n}": (random_bytes(n), NOT_ONNX) for n in range(3)},
    "empty": (lambda: write("m.onnx", b""), "is empty"),
    "zip": (a_zip, "zip archive"),
    "tflite": (lambda: write("m.onnx", b"\x1c\0\0\0TFL3" + bytes(64)), "TensorFlow Lite"),
    "hdf5": (lambda: write("m.onnx", b"\x89HDF\r\n\x1a\n" + bytes(64)), "HDF5"),
    "text": (lambda: write("m.onnx", "this is no model\n" * 20), NOT_ONNX),
    "html": (lambda: write("m.onnx", "<!DOCTYPE html><html>404</html>"), NOT_ONNX),
    "zeros": (lambda: write("m.onnx", bytes(1000)), NOT_ONNX),
    "git-lfs-pointer": (lambda: write("m.onnx", "version https://git-lfs.github.com/spec/v1\n"), NOT_ONNX),
    "folder": (a_folder, "is a folder"),
    "missing": (lambda: Path("nope.onnx"), "no such file"),
}

BAD_WEIGHTS: dict[str, tuple[Callable[[], Path], str]] = {
    "external-missing": (external("gone.bin"), "is missing"),
    "external-absolute": (external("/etc/hostname"), "outside the model's folder"),
    "external-parent": (external("../outside.bin"), "outside the model's folder"),
    "external-detour": (external("sub/../../outside.bin"), "outside the model's folder"),
    "external-symlink": (external("link.bin"), "outside the model's folder"),
    "external-length": (external("real.bin", length="3"), "needs"),
    "external-offset": (external("real.bin", offset="64"), "has only"),
    "external-negative": (external("real.bin", offset="-1"), "offset"),
    "external-folder": (external("."), "external data"),
}


def verbs(model: Path) -> dict[str, list[str | Path]]:
    return {
        "optimize": ["optimize", model, "-o", "out.onnx", "--time", "0"],
        "quantize": ["quantize", model, "-o", "out.onnx", "--data", GOOD_DATA, "--time", "0"],
        "compress": ["compress", model, "-o", "out.onnx", "--time", "0"],
        "compare": ["compare", GOOD, model],
        "inspect": ["inspect", model],
    }


@pytest.mark.parametrize("verb", ["optimize", "quantize", "compress", "compare", "inspect"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_no_model(name: str, verb: str, workplace: Path, untouched: Watch) -> None:
    make, fragment = UNREADABLE[name]
    failed(2, fragment, *verbs(make())[verb], watch=untouched)


@pytest.mark.parametrize("verb", ["optimize", "quantize", "compare"])
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_external_weights_that_are_not_there_or_not_allowed(
    name: str, verb: str, workplace: Path, untouched: Watch
) -> None:
    make, fragment = BAD_WEIGHTS[name]
    failed(2, fragment, *verbs(make())[verb], watch=untouched)


def test_inspect_reads_no_weight(workplace: Path) -> None:
    ran = run_cli("inspect", external("gone.bin")())
    assert ran.code == 0
    assert "of external weights" in ran.out


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs there")
def test_a_pipe_nobody_writes_to_does_not_hang(workplace: Path) -> None:
    external("pipe.bin")()
    os.mkfifo("pipe.bin")
    assert "no regular file" in run_process("optimize", "m.onnx", "-o", "out.onnx").error


def test_outside_weights_are_read_where_the_user_says_so(workplace: Path) -> None:
    ran = run_cli("optimize", external("../outside.bin")(), "-o", "out.onnx", "--external-root", "..", "--time", "0")
    assert ran.code == 0, ran.err


def test_standard_input_that_is_no_model(workplace: Path, untouched: Watch) -> None:
    with untouched(workplace):
        ran = run_cli("-", "out.onnx", stdin=b"nonsense")
    assert ran.code == 2
    assert "standard input is not an ONNX model" in ran.error
    assert "standard input is empty" in run_cli("inspect", "-").error


# Data


def npz(**arrays: Any) -> Callable[[], str]:
    def make() -> str:
        np.savez("d.npz", **arrays)
        return "d.npz"

    return make


def nan_data() -> np.ndarray[Any, Any]:
    data = np.load(GOOD_DATA)["image"].copy()
    data[3, 0, 0, 0] = np.nan
    return data


def pickled() -> str:
    with zipfile.ZipFile("d.npz", "w") as archive:
        archive.writestr("image.npy", b"\x80\x04cposix\nsystem\n.")
    return "d.npz"


IMAGE = np.zeros((3, 8, 8, 8), np.float32)

BAD_DATA: dict[str, tuple[Callable[[], str], str]] = {
    "missing": (lambda: "nope.npz", "no file or folder 'nope.npz'"),
    "all-nan": (npz(image=np.full_like(IMAGE, np.nan)), "NaN"),
    "all-inf": (npz(image=np.full_like(IMAGE, np.inf)), "infinite"),
    "wrong-shape": (npz(image=np.zeros((3, 8, 9, 9), np.float32)), "'image'"),
    "wrong-rank": (npz(image=np.zeros((3, 8), np.float32)), "'image'"),
    "wrong-dtype": (npz(image=np.full((3, 8, 8, 8), "x")), "'image'"),
    "complex": (npz(image=IMAGE.astype(np.complex64)), "'image'"),
    "missing-input": (npz(label=np.zeros(3, np.int64)), "has no input 'image'"),
    "misspelt-input": (npz(imgae=IMAGE), "it has 'imgae'"),
    "no-samples": (npz(image=IMAGE[:0]), "no sample"),
    "objects": (npz(image=np.array([{}, None, "x"], dtype=object)), "Python objects"),
    "pickle": (pickled, "image.npy"),
    "empty-npz": (npz(), "d.npz"),
    "empty-file": (lambda: str(write("d.npz", b"")), "d.npz"),
    "truncated": (lambda: str(write("d.npz", GOOD_DATA.read_bytes()[:3000])), "d.npz"),
    "text": (lambda: str(write("d.npz", "no archive")), "d.npz"),
    "model-as-data": (lambda: str(shutil.copy(GOOD, "d.onnx")), "d.onnx"),
    "empty-folder": (lambda: Path("d").mkdir() or "d", "'d'"),
    "script-missing": (lambda: "nope.py:load", "nope.py"),
    "script-raises": (lambda: f"{write('d.py', 'def load():' + chr(10) + '    raise KeyError(7)')}:load", "KeyError"),
    "script-no-function": (lambda: f"{write('d.py', 'x = 1')}:load", "load"),
    "script-syntax": (lambda: f"{write('d.py', 'def (')}:load", "SyntaxError"),
}


@pytest.mark.parametrize("verb", ["quantize", "compare"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_does_not_fit(name: str, verb: str, workplace: Path, untouched: Watch) -> None:
    make, fragment = BAD_DATA[name]
    spec = make()
    command = {"quantize": ["quantize", GOOD, "-o", "out.onnx", "--time", "0"], "compare": ["compare", GOOD, GOOD]}
    failed(2, fragment, *command[verb], "--data", spec, watch=untouched)


def test_one_bad_sample_is_left_out_and_said(workplace: Path) -> None:
    spec = npz(image=nan_data())()
    ran = run_cli("quantize", GOOD, "-o", "out.onnx", "--data", spec, "--time", "0", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["data"]["samples"] == 23
    assert "d.npz[3]" in ran.json["data"]["skipped"][0]
    assert "d.npz[3]" in run_cli("compare", GOOD, "out.onnx", "--data", spec).out


def test_a_key_that_is_no_input_is_a_label(workplace: Path) -> None:
    spec = npz(image=np.load(GOOD_DATA)["image"], extra=np.zeros(24, np.int64))()
    assert run_cli("quantize", GOOD, "-o", "out.onnx", "--data", spec, "--time", "0").code == 0


def test_static_quantization_without_data_shows_how(workplace: Path, untouched: Watch) -> None:
    ran = failed(2, "needs calibration data", "quantize", GOOD, "-o", "out.onnx", watch=untouched)
    for way in ("--data calibration.npz", "--data folder/", "--data loader.py:function", "--data random"):
        assert way in ran.err


def test_random_data_is_used_only_when_spelled_out_and_said(workplace: Path) -> None:
    ran = run_cli("quantize", GOOD, "-o", "out.onnx", "--data", "random", "--time", "0", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["data"]["synthetic"] is True
    assert any("WARNING: calibrated on random data" in note for note in ran.json["notes"])


# Models that cannot be run here


def test_an_unknown_operator_is_optimized_around_with_a_note(workplace: Path) -> None:
    ran = run_cli("optimize", MODELS / "custom.onnx", "-o", "out.onnx", "--time", "0")
    assert ran.code == 0, ran.err
    assert "note: nothing was compared or timed" in ran.out
    assert ran.out.count("MysteryOp(-1)") == 1
    assert Path("out.onnx").is_file()
    assert run_cli("inspect", "out.onnx").code == 0


def test_an_unknown_operator_cannot_be_quantized_or_compared(workplace: Path, untouched: Watch) -> None:
    custom = MODELS / "custom.onnx"
    data = DATA / "custom.npz"
    failed(2, "MysteryOp", "quantize", custom, "-o", "out.onnx", "--data", data, watch=untouched)
    failed(2, "MysteryOp", "compare", custom, custom, watch=untouched)


def test_models_with_other_inputs_are_not_compared(workplace: Path, untouched: Watch) -> None:
    failed(2, "same inputs", "compare", GOOD, MODELS / "encoder.onnx", watch=untouched)


# Outputs


def makers(out: str) -> list[list[str | Path]]:
    return [
        ["optimize", GOOD, "-o", out, "--time", "0"],
        ["quantize", GOOD, "-o", out, "--data", GOOD_DATA, "--time", "0"],
        [GOOD, out],
    ]


@pytest.mark.parametrize(
    ("out", "fragment"),
    [
        ("nofolder/out.onnx", "mkdir -p nofolder"),
        ("folder", "is a folder"),
        ("file/out.onnx", "is a file"),
        ("pipe", "no regular file"),
    ],
)
def test_an_output_that_cannot_be(out: str, fragment: str, workplace: Path, untouched: Watch) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    os.mkfifo("pipe")
    for command in makers(out):
        ran = run_cli(*command)
        assert ran.code == 2
        assert fragment in ran.error
        assert sorted(p.name for p in workplace.iterdir()) == ["file", "folder", "pipe"]


def test_a_folder_that_is_read_only(workplace: Path, untouched: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:  # whom no permission stops
        monkeypatch.setattr("graphopt.cli._finish.os.access", lambda *_: False)
    else:
        workplace.chmod(0o555)
    for command in makers("out.onnx"):
        failed(2, "not writable", *command, watch=untouched)
    workplace.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
@pytest.mark.parametrize("options", [(), ("--external-data",)])
def test_a_disk_that_is_full(options: tuple[str, ...], workplace: Path, untouched: Watch) -> None:
    """A limit on file size fails in the middle of the write, as a full disk does."""
    import resource

    write("out.onnx", b"what was there before")
    command = [
        "optimize",
        DEMO / "digits.onnx",
        "-o",
        "out.onnx",
        "--passes",
        "fold-constants",
        "--time",
        "0",
        *options,
    ]
    limit = (300_000, 300_000)
    with untouched(workplace):
        ran = run_process(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert ran.code == 2
    assert "cannot write out.onnx" in ran.error


def test_two_results_cannot_share_stdout(workplace: Path, untouched: Watch) -> None:
    failed(2, "both want stdout", "optimize", GOOD, "-o", "-", "--json", watch=untouched)
    failed(2, "both want stdout", "optimize", GOOD, "-o", "o.onnx", "--json", "--markdown", watch=untouched)


# Recipes

STEP = '[[pass]]\nuse = "fold-constants"\n'
BAD_RECIPES = {
    "not-toml": ("model = \n", "not valid TOML"),
    "unknown-key": ('modle = "m.onnx"\n' + STEP, "did you mean 'model'"),
    "unknown-pass": ('[[pass]]\nuse = "fold-constant"\n', "did you mean 'fold-constants'"),
    "unknown-option": ('[[pass]]\nuse = "quantize-static"\nobservr = "mse"\n', "did you mean 'observer'"),
    "option-type": ('[[pass]]\nuse = "quantize-static"\nobserver = 3\n', "observer"),
    "option-value": ('[[pass]]\nuse = "quantize-static"\nobserver = "maximum"\n', "observer"),
    "unknown-gate": ("[gates]\nmax-dorp = 1\n" + STEP, "did you mean 'max-drop'"),
    "gate-type": ('[gates]\nmin-sqnr = "high"\n' + STEP, "min-sqnr"),
    "gate-value": ('[gates]\nmax-size = "large"\n' + STEP, "no size"),
    "seed-type": ('seed = "a"\n' + STEP, "seed"),
    "verify-value": ('verify = "never"\n' + STEP, "verify"),
    "target": ('target = "abacus"\n' + STEP, "unknown target"),
    "pass-is-a-table": ('[pass]\nuse = "fold-constants"\n', "[[pass]]"),
    "pass-without-use": ('[[pass]]\nobserver = "mse"\n', "no 'use'"),
    "callable-missing": ('[[pass]]\nuse = "nope.py:f"\n', "nope.py"),
    "binary": ("\0\1\2", "recipe.toml"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_recipe_that_is_wrong(name: str, workplace: Path, untouched: Watch) -> None:
    text, fragment = BAD_RECIPES[name]
    head = "" if name in ("not-toml", "unknown-key", "binary") else f'model = "{GOOD}"\noutput = "out.onnx"\n'
    write("recipe.toml", head + text)
    failed(2, fragment, "run", "recipe.toml", watch=untouched)
    failed(2, fragment, "optimize", GOOD, "-o", "out.onnx", "--recipe", "recipe.toml", watch=untouched)


def test_a_recipe_without_what_run_needs(workplace: Path, untouched: Watch) -> None:
    write("no-model.toml", 'output = "out.onnx"\n' + STEP)
    write("no-output.toml", f'model = "{GOOD}"\n' + STEP)
    write("lost-model.toml", 'model = "lost.onnx"\noutput = "out.onnx"\n' + STEP)
    write("no-data.toml", f'model = "{GOOD}"\noutput = "out.onnx"\n[[pass]]\nuse = "quantize-static"\n')
    for name, fragment in (
        ("no-model", "names no model"),
        ("no-output", "names no output"),
        ("lost-model", "no such file"),
        ("no-data", "needs calibration data"),
        ("missing", "no such recipe"),
    ):
        failed(2, fragment, "run", f"{name}.toml", watch=untouched)


# Metrics and gates

BAD_METRICS = {
    "unknown": ("acuracy", "unknown metric 'acuracy'"),
    "no-file": ("nope.py:f", "no such file: nope.py"),
    "no-function": ("m.py:nothing", "no function 'nothing'"),
    "no-callable": ("m.py:number", "number"),
    "syntax": ("bad.py:f", "SyntaxError"),
    "raises": ("m.py:divide", "ZeroDivisionError"),
    "text": ("m.py:text", "not a number"),
    "no-labels": ("accuracy", "needs labels"),
}


@pytest.mark.parametrize("name", BAD_METRICS)
def test_a_metric_that_fails(name: str, workplace: Path, untouched: Watch) -> None:
    spec, fragment = BAD_METRICS[name]
    write("m.py", "number = 1\ndef divide(o, s):\n    return 1 / 0\ndef text(o, s):\n    return 'x'\n")
    write("bad.py", "def (")
    sys.dont_write_bytecode = True
    judged = ["--data", GOOD_DATA, "--metric", spec]
    failed(2, fragment, "compare", GOOD, GOOD, *judged, watch=untouched)
    failed(2, fragment, "optimize", GOOD, "-o", "out.onnx", "--time", "0", *judged, watch=untouched)


USAGE = {
    "verb": (["optimise", GOOD, "o.onnx"], "did you mean 'optimize'"),
    "verb-unlike-any": (["bogus"], "verbs: convert, optimize"),
    "option": (["optimize", GOOD, "-o", "o.onnx", "--verfy", "end"], "did you mean '--verify'"),
    "option-before-verb": (["--json", "optimize", GOOD, "o.onnx"], "options follow it"),
    "choice": (["optimize", GOOD, "-o", "o.onnx", "--verify", "never"], "--verify"),
    "no-output": (["optimize", GOOD], "no output"),
    "no-output-either": ([GOOD], "no output"),
    "two-outputs": (["optimize", GOOD, "a.onnx", "-o", "b.onnx"], "two outputs"),
    "three-files": ([GOOD, "a.onnx", "b.onnx"], "unexpected extra argument"),
    "no-passes": (["optimize", GOOD, "-o", "o.onnx", "--passes", ","], "no passes"),
    "unknown-pass": (["optimize", GOOD, "-o", "o.onnx", "--passes", "fold"], "unknown pass 'fold'"),
    "passes-and-recipe": (["optimize", GOOD, "-o", "o.onnx", "--passes", "simplify", "--recipe", "r"], "both"),
    "target": (["optimize", GOOD, "-o", "o.onnx", "--target", "abacus"], "unknown target"),
    "target-in-a-plan": (["quantize", GOOD, "--dry-run", "--target", "abacus"], "unknown target"),
    "seed": (["optimize", GOOD, "-o", "o.onnx", "--seed", "-1"], "--seed"),
    "samples": (["optimize", GOOD, "-o", "o.onnx", "--samples", "2"], "--samples"),
    "time": (["optimize", GOOD, "-o", "o.onnx", "--time", "soon"], "--time"),
    "time-inf": (["optimize", GOOD, "-o", "o.onnx", "--time", "inf"], "--time"),
    "drop-without-metric": (["optimize", GOOD, "-o", "o.onnx", "--max-drop", "1%"], "needs a metric"),
    "drop-without-metric-compared": (["compare", GOOD, GOOD, "--max-drop", "1%"], "needs a metric"),
    "metric-without-data": (["optimize", GOOD, "-o", "o.onnx", "--metric", "accuracy"], "needs data"),
    "metric-without-data-compared": (["compare", GOOD, GOOD, "--metric", "accuracy"], "needs data"),
    "drop": (
        ["quantize", GOOD, "-o", "o.onnx", "--data", GOOD_DATA, "--metric", "accuracy", "--max-drop", "little"],
        "--max-drop 'little'",
    ),
    "size": (["optimize", GOOD, "-o", "o.onnx", "--max-size", "small"], "--max-size 'small'"),
    "sqnr": (["optimize", GOOD, "-o", "o.onnx", "--min-sqnr", "nan"], "--min-sqnr"),
    "certify-alone": (["optimize", GOOD, "-o", "o.onnx", "--certify"], "--max-drop"),
    "speedup-untimed": (["optimize", GOOD, "-o", "o.onnx", "--min-speedup", "1", "--time", "0"], "--time 0"),
    "observer-of-dynamic": (["quantize", GOOD, "-o", "o.onnx", "--mode", "dynamic", "--observer", "mse"], "--observer"),
    "exclude-nothing": (
        ["quantize", GOOD, "-o", "o.onnx", "--data", GOOD_DATA, "--exclude", "no_such_node"],
        "matches no node",
    ),
    "exclude-nothing-planned": (["quantize", GOOD, "--dry-run", "--exclude", "no_such_node"], "matches no node"),
    "exclude-pattern": (["quantize", GOOD, "--dry-run", "--exclude", "re:("], "regular expression"),
    "image-without-size": (["optimize", GOOD, "-o", "o.onnx", "--mean", "1,2"], "--image-size"),
    "image-size": (["optimize", GOOD, "-o", "o.onnx", "--image-size", "big"], "--image-size"),
    "dim": (["inspect", GOOD, "--dim", "batch"], "--dim"),
    "dim-unknown": (["inspect", GOOD, "--dim", "time=3"], "its inputs have batch"),
    "max-abs": (["compare", GOOD, GOOD, "--max-abs", "-1"], "--max-abs"),
    "pass-unknown": (["passes", "fold-constant"], "did you mean 'fold-constants'"),
    "compress-weights": (["compress", GOOD, "-o", "o.onnx", "--weights", "int5"], "did you mean 'int8'"),
    "compress-block": (["compress", GOOD, "-o", "o.onnx", "--weights", "int4", "--block", "512"], "--block"),
    "compress-rounding": (["compress", GOOD, "-o", "o.onnx", "--rounding", "data"], "give --data"),
    "compress-keep": (["compress", GOOD, "-o", "o.onnx", "--weights", "keep"], "give --package"),
    "compress-keep-gate": (
        ["compress", GOOD, "-o", "o.gopt", "--weights", "keep", "--package", "--min-sqnr", "3"],
        "leave out",
    ),
    "compress-auto": (["compress", GOOD, "-o", "o.onnx", "--weights", "auto"], "give --size"),
    "compress-auto-blind": (
        ["compress", GOOD, "-o", "o.onnx", "--weights", "auto", "--min-sqnr", "9"],
        "give --eval-data",
    ),
    "compress-size": (["compress", GOOD, "-o", "o.onnx", "--size", "small"], "--size 'small'"),
    "compress-size-and-format": (["compress", GOOD, "-o", "o.onnx", "--size", "1MB", "--weights", "int4"], "give one"),
    "compress-auto-memory": (["compress", GOOD, "-o", "o.onnx", "--size", "0.5", "--memory", "9"], "raise it"),
    "compress-memory": (["compress", GOOD, "-o", "o.onnx", "--memory", "much"], "--memory 'much'"),
    "compress-memory-gate": (["compress", GOOD, "-o", "o.onnx", "--memory", "9", "--min-sqnr", "3"], "raise --memory"),
    "compress-memory-dim": (["compress", GOOD, "-o", "o.onnx", "--memory", "9", "--dim", "batch=1"], "raise --memory"),
    "compress-exclude": (["compress", GOOD, "-o", "o.onnx", "--exclude", "nothing_here"], "matches no node"),
    "compress-package-stdout": (["compress", GOOD, "-o", "-", "--package"], "name one with -o"),
    "unpack-model": (["unpack", GOOD, "-o", "o.onnx"], "no graphopt package"),
    "unpack-missing": (["unpack", "none.gopt", "-o", "o.onnx"], "no such file"),
    "unpack-stdout": (["unpack", GOOD, "-o", "-"], "name an output file"),
    "demo-in-a-file": (["demo", "-o", GOOD], "cannot make the folder"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_that_is_wrong(name: str, workplace: Path, untouched: Watch) -> None:
    arguments, fragment = USAGE[name]
    failed(2, fragment, *arguments, watch=untouched)
