"""The command line as a user meets it: every verb, help, exit codes, streams, interruption."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from conftest import DATA, DEMO, MODELS, ROOT, Ran, run_cli, run_process

from graphopt.cli import VERBS, cli

Watch = Callable[[Path], AbstractContextManager[None]]
DIGITS = DEMO / "digits.onnx"
CALIBRATION = DEMO / "calibration.npz"
EVALUATION = DEMO / "evaluation.npz"
QUANTIZE = ["quantize", DIGITS, "-o", "int8.onnx", "--data", CALIBRATION, "--eval-data", EVALUATION, "--time", "0"]

RECIPE = """\
model = "model.onnx"
output = "recipe.onnx"
data = "calib.npz"

[[pass]]
use = "fold-constants"

[[pass]]
use = "fuse-batchnorm"

[[pass]]
use = "quantize-static"
"""


@pytest.fixture
def examples(workplace: Path) -> Path:
    """A folder with every file that the examples in --help and the README read."""
    for name in ("model.onnx", "before.onnx", "other.onnx"):
        shutil.copy(DIGITS, name)
    for name in ("small.onnx", "int8.onnx", "after.onnx"):
        assert (
            run_cli("optimize", "model.onnx", "-o", name, "--passes", "fuse-batchnorm", "--time", "0", "-q").code == 0
        )
    worse = onnx.load(DIGITS)
    for tensor in worse.graph.initializer:
        if tensor.name == "head.weight":
            weights = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights * np.float32(0.5), tensor.name))
    for name in ("student.onnx", "thin.onnx"):
        onnx.save(worse, name)
    shutil.copy(DIGITS, "llm.onnx")
    packed = run_cli("compress", DIGITS, "-o", "model.gopt", "--weights", "keep", "--package", "--time", "0", "-q")
    assert packed.code == 0, packed.err
    shutil.copy(CALIBRATION, "calib.npz")
    shutil.copy(CALIBRATION, "calibration.npz")
    shutil.copy(EVALUATION, "test.npz")
    for name in ("int8.toml", "recipe.toml", "r.toml"):
        Path(name).write_text(RECIPE)
    return workplace


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    ran = run_cli(verb, "--help")
    assert ran.code == 0
    assert "Example:" in ran.out
    assert f"graphopt {verb}" in ran.out.split("Example:")[1]
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "--heading" not in ran.out
    assert all(option in ran.out for option in ("--json", "-v, --verbose", "-h, --help"))


def test_help_lists_every_verb_and_the_exit_codes() -> None:
    ran = run_cli("--help")
    assert ran.code == 0
    for verb, summary in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(summary)}$", ran.out, re.MULTILINE)
    assert "3 the work asked for did not happen" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    assert run_cli("-h").out == ran.out


def test_no_arguments_is_help_and_not_success() -> None:
    ran = run_process()
    assert ran.code == 2
    assert "Usage: graphopt" in ran.err
    assert ran.out == ""


def test_version() -> None:
    assert re.fullmatch(r"graphopt \d+\.\d+\.\d+\S*\n", run_cli("--version").out)


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "graphopt", "--help"], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {"onnx", "onnxruntime", "numpy", "scipy", "rich", "onnx_ir", "networkx", "onnxsim", "sympy"}


# Every example in the help and in the README is run


def commands(text: str) -> list[list[str]]:
    """The ``graphopt`` commands of indented or fenced lines, continued lines joined, comments cut."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if line.strip().startswith("graphopt ") else []
        if len(words) > 1 and "|" not in words and words[1] != "VERB":
            found.append(words[1:])
    return found


def from_help() -> list[list[str]]:
    return [c for verb in VERBS for c in commands(run_cli(verb, "--help").out.split("Example:")[1])]


def from_readme() -> list[list[str]]:
    readme = ROOT / "README.md"
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [c for block in blocks for c in commands(block)]


ELSEWHERE = {"view", "extract", "diff", "bisect", "tune", "convert", "export"}
"""Verbs whose examples name what another model has, open a window, need a framework, or end in 1: their own tests run
them, and ``--locked``."""

EXAMPLES = list(dict.fromkeys(map(tuple, [*from_help(), *from_readme()])))


def test_every_verb_has_an_example_and_every_example_a_verb() -> None:
    verbs = {example[0] for example in EXAMPLES}
    assert verbs >= set(VERBS)
    assert all(verb in VERBS or verb.endswith(".onnx") for verb in verbs)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e[0] in VERBS], ids=" ".join)
def test_every_example_is_understood(example: tuple[str, ...]) -> None:
    verb, *words = example
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    command.make_context(verb, words)


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if e[0] not in ELSEWHERE and e != ("demo",) and "--locked" not in e], ids=" ".join
)
def test_example(example: tuple[str, ...], examples: Path) -> None:
    words = list(example)
    if "--min-speedup" in words:  # what a test must not wait for, or fail by
        words[words.index("--min-speedup") + 1] = "0"
        words += ["--time", "0.1"]
    elif words[0] in ("optimize", "quantize", "prune", "run"):
        words += ["--time", "0"]
    elif words[0] == "finetune":
        words += ["--time", "0", "--steps", "10", "--freeze", "Conv"]
    ran = run_cli(*words)
    assert ran.code == 0, ran.err
    assert ran.err == ""


# The main job


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """The demo's model quantized once, with the report in JSON."""
    out = tmp_path_factory.mktemp("int8") / "int8.onnx"
    ran = run_cli(
        "quantize", DIGITS, "-o", out, "--data", CALIBRATION, "--eval-data", EVALUATION, "--metric", "accuracy",
        "--max-drop", "1%", "--max-size", "0.30", "--time", "0", "--json",
    )  # fmt: skip
    return out, ran


def test_quantize_keeps_accuracy_and_is_a_quarter_of_the_size(int8: tuple[Path, Ran]) -> None:
    out, ran = int8
    assert ran.code == 0, ran.err
    metric = ran.json["metric"]
    assert metric["samples"] == 597
    assert metric["candidate"] >= metric["original"] * 0.99
    assert out.stat().st_size <= 0.30 * DIGITS.stat().st_size
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_json_has_the_files_hashes_and_sizes(int8: tuple[Path, Ran]) -> None:
    out, ran = int8
    for key, path in (("input", DIGITS), ("output", out)):
        assert ran.json[key]["path"] == str(path)
        assert ran.json[key]["bytes"] == path.stat().st_size
        assert ran.json[key]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_json_echoes_the_options_in_effect(int8: tuple[Path, Ran]) -> None:
    options = int8[1].json["options"]
    assert options["data"] == str(CALIBRATION)
    assert options["observer"] == "mse"
    assert options["target"] == "ort-cpu"
    assert options["seed"] == 0
    assert options["gates"] == {"max_drop": "1%", "max_size": "0.30"}


def test_quantizing_twice_is_refused_with_advice(int8: tuple[Path, Ran], workplace: Path, untouched: Watch) -> None:
    with untouched(workplace):
        for mode in (["--data", CALIBRATION], ["--mode", "dynamic"]):
            ran = run_cli("quantize", int8[0], "-o", "again.onnx", *mode)
            assert ran.code == 2
            assert "quantized already" in ran.error
            assert "start from the float model" in ran.error


def test_compare_holds_the_result_to_tolerances(int8: tuple[Path, Ran]) -> None:
    judged = ["compare", DIGITS, int8[0], "--data", EVALUATION, "--metric", "accuracy"]
    assert run_cli(*judged, "--max-drop", "1%", "--min-sqnr", "20", "--max-abs", "5").code == 0
    ran = run_cli(*judged, "--min-sqnr", "500", "--json")
    assert ran.code == 1
    assert ran.json["exit_code"] == 1
    assert "gate min-sqnr 500 dB failed" in ran.error
    assert ran.json["error"] in ran.error


def test_compare_of_a_model_with_itself(workplace: Path) -> None:
    ran = run_cli("compare", DIGITS, DIGITS, "--max-abs", "0", "--min-sqnr", "100")
    assert ran.code == 0
    assert "identical" in ran.out
    assert "legal random samples" in ran.out


@pytest.mark.parametrize("gate", [("--max-size", "0.01"), ("--min-sqnr", "500"), ("--min-speedup", "1000")])
def test_a_gate_that_fails_writes_nothing(gate: tuple[str, str], workplace: Path, untouched: Watch) -> None:
    Path("int8.onnx").write_bytes(b"what was there before")
    with untouched(workplace):
        timed = ["--time", "0.1"] if gate[0] == "--min-speedup" else []
        ran = run_cli(*QUANTIZE, *gate, *timed, "--json")
    assert ran.code == 1
    assert "nothing was written" in ran.error
    assert ran.json["gates"][0]["passed"] is False
    assert ran.json["output"]["path"] is None


def test_the_report_is_shown_although_a_gate_failed(workplace: Path) -> None:
    ran = run_cli(
        "optimize", DIGITS, "-o", "o.onnx", "--max-size", "1", "--time", "0", "--samples", "1", "--data", CALIBRATION
    )
    assert ran.code == 0, ran.err
    ran = run_cli("optimize", DIGITS, "-o", "o.onnx", "--max-size", "100kB", "--time", "0")
    assert ran.code == 1
    assert "(nothing was written)" in ran.out
    assert "gate max-size 100kB (100.00 kB): FAILED" in ran.out


def test_nothing_to_quantize_is_no_success(workplace: Path, untouched: Watch) -> None:
    """A GRU alone, and weights that callers may replace: exit 3 with the reason."""
    onnx.utils.extract_model(str(MODELS / "gru.onnx"), "recurrent.onnx", ["sequence"], ["/cell/GRU_output_0"])
    with untouched(workplace):
        ran = run_cli("quantize", "recurrent.onnx", "-o", "out.onnx", "--data", DATA / "gru.npz", "--time", "0")
        assert ran.code == 3
        assert "no integer GRU" in ran.error
        ran = run_cli(
            "quantize", MODELS / "overridable.onnx", "-o", "out.onnx", "--data", DATA / "overridable.npz", "--json"
        )
        assert ran.code == 3
        assert ran.json["exit_code"] == 3
        assert "also a graph input" in ran.error


def test_what_stays_in_float_is_listed_with_the_reason(workplace: Path) -> None:
    ran = run_cli("quantize", MODELS / "gru.onnx", "-o", "out.onnx", "--data", DATA / "gru.npz", "--time", "0")
    assert ran.code == 0, ran.err
    assert "left in float: 1 node\n  GRU: ONNX Runtime has no integer GRU" in ran.out


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_dry_run_writes_nothing_and_needs_no_data(mode: str, workplace: Path, untouched: Watch) -> None:
    with untouched(workplace):
        ran = run_cli("quantize", MODELS / "encoder.onnx", "--dry-run", "--mode", mode)
        assert ran.code == 0, ran.err
        assert re.match(r"would quantize \d+ layers", ran.out)
        plan = run_cli("quantize", MODELS / "encoder.onnx", "--dry-run", "--mode", mode, "--json").json
    assert plan["dry_run"] is True
    assert plan["options"]["mode"] == mode
    assert all(skip["reason"] for skip in plan["skipped"])


def test_dry_run_tells_what_is_done(workplace: Path) -> None:
    plan = run_cli("quantize", MODELS / "opset11.onnx", "--dry-run", "--json").json
    arguments = ["-o", "out.onnx", "--data", DATA / "opset11.npz", "--time", "0", "--json"]
    done = run_cli("quantize", MODELS / "opset11.onnx", *arguments).json
    assert len(plan["layers"]) == done["ledger"][-1]["metrics"]["layers_quantized"]


def test_optimize_is_idempotent(workplace: Path) -> None:
    for source, out in ((MODELS / "encoder.onnx", "once.onnx"), ("once.onnx", "twice.onnx")):
        assert run_cli("optimize", source, "-o", out, "--time", "0").code == 0
    assert Path("once.onnx").read_bytes() == Path("twice.onnx").read_bytes()


def test_run_and_its_options(examples: Path) -> None:
    assert run_cli("run", "recipe.toml", "--time", "0").code == 0
    assert run_cli("run", "recipe.toml", "--time", "0", "--model", "other.onnx", "-o", "o.onnx").code == 0
    assert Path("recipe.onnx").read_bytes() == Path("o.onnx").read_bytes()


def test_demo(workplace: Path) -> None:
    ran = run_cli("demo")
    assert ran.code == 0, ran.err
    assert "gate max-drop 1%: holds" in ran.out
    assert "latency, 1 thread" in ran.out
    assert Path("graphopt-demo/digits.int8.onnx").is_file()


# Streams


def test_a_bare_pair_of_files_is_optimize(workplace: Path) -> None:
    assert run_cli(DIGITS, "a.onnx", "--time", "0").code == 0
    assert run_cli("optimize", DIGITS, "-o", "b.onnx", "--time", "0").code == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_the_output_may_be_the_input(workplace: Path) -> None:
    shutil.copy(DIGITS, "m.onnx")
    assert run_cli("optimize", "m.onnx", "-o", "m.onnx", "--time", "0").code == 0
    assert Path("m.onnx").stat().st_size < DIGITS.stat().st_size
    assert [p.name for p in workplace.iterdir()] == ["m.onnx"]


def test_stdin_and_stdout(workplace: Path) -> None:
    command = [sys.executable, "-m", "graphopt", "-", "-", "--time", "0"]
    done = subprocess.run(command, input=DIGITS.read_bytes(), capture_output=True, check=True)
    assert run_cli("optimize", DIGITS, "-o", "o.onnx", "--time", "0").code == 0
    assert done.stdout == Path("o.onnx").read_bytes()
    assert b"-> stdout" in done.stderr


def test_stdin_has_its_own_hash(workplace: Path) -> None:
    ran = run_cli("optimize", "-", "-o", "o.onnx", "--json", "--time", "0", stdin=DIGITS.read_bytes())
    assert ran.json["input"]["sha256"] == hashlib.sha256(DIGITS.read_bytes()).hexdigest()
    assert ran.json["input"]["path"] is None


@pytest.mark.parametrize(
    "command",
    [
        ["optimize", DIGITS, "-o", "o.onnx", "--time", "0"],
        ["quantize", DIGITS, "--dry-run"],
        ["compare", DIGITS, DIGITS],
        ["inspect", DIGITS],
        ["inspect", DIGITS, MODELS / "gru.onnx"],
        ["passes"],
        ["passes", "quantize-static"],
        ["targets"],
    ],
    ids=lambda command: " ".join(c for c in command if isinstance(c, str)),
)
def test_json_is_all_there_is_on_stdout(command: list[str | Path], workplace: Path) -> None:
    ran = run_cli(*command, "--json")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert ran.json["schema_version"] == 1
    json.loads(ran.out, parse_constant=pytest.fail)  # what no other parser takes: NaN, Infinity


def test_quiet(workplace: Path) -> None:
    ran = run_cli("optimize", DIGITS, "-o", "o.onnx", "--time", "0", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert Path("o.onnx").is_file()
    ran = run_cli("optimize", DIGITS, "-o", "p.onnx", "--time", "0", "-q", "--max-size", "0.1")
    assert (ran.code, ran.out) == (1, "")
    assert "max-size" in ran.error
    assert run_cli("compare", DIGITS, DIGITS, "-q", "--json").json["verb"] == "compare"


def test_verbose_shows_the_traceback_of_an_error(workplace: Path) -> None:
    ran = run_cli("optimize", "nope.onnx", "-o", "o.onnx", "-v")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: no such file")
    assert "Traceback" not in run_cli("optimize", "nope.onnx", "-o", "o.onnx").err


def test_an_internal_error_is_code_4_and_one_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug\nin two lines")

    monkeypatch.setattr("graphopt.api.optimize", broken)
    ran = run_cli("optimize", DIGITS, "-o", "o.onnx")
    assert ran.code == 4
    assert "internal error: ZeroDivisionError: a bug in two lines" in ran.error


def test_paths_with_spaces_and_other_scripts(workplace: Path) -> None:
    folder = workplace / "модели 模型"
    folder.mkdir()
    source, out = folder / "вход 1.onnx", folder / "выход.onnx"
    shutil.copy(DIGITS, source)
    ran = run_process("optimize", source, "-o", out, "--time", "0", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ran.code == 0, ran.err
    assert out.is_file()


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m graphopt inspect {shlex.quote(str(DIGITS))} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_colour_and_progress_only_on_a_terminal(workplace: Path) -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    data = ["--data", str(DATA / "shared.npz"), "--time", "0"]
    command = [sys.executable, "-m", "graphopt", "quantize", str(MODELS / "shared.onnx"), "-o", "q.onnx", *data]
    plain = subprocess.run(command, capture_output=True, check=True)
    assert b"\x1b" not in plain.stdout + plain.stderr
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                block = os.read(leader, 65536)
            except OSError:
                break
            if not block:
                break
            shown += block
    os.close(leader)
    assert process.returncode == 0
    assert b"\x1b[32mchanged" in shown
    assert b"calibrating" in shown
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode().replace("\r", "")
    table = re.search(r"^ +original +result.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert max(map(len, table[0].splitlines())) <= 80


# Interruption


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc to know how far the process is")
@pytest.mark.parametrize("after", [0.0, 1.0])
def test_interrupting_leaves_nothing(after: float, workplace: Path, untouched: Watch) -> None:
    """While the runtime is being loaded, and in the middle of the work."""
    images = np.load(CALIBRATION)["image"]
    np.savez("many.npz", image=np.repeat(images, 100, axis=0))
    command = [sys.executable, "-m", "graphopt", "quantize", str(DIGITS), "-o", "out.onnx", "--data", "many.npz"]
    # A background job of a shell ignores SIGINT, and so would the child; what has a handler here is default there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with untouched(workplace):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err == "error: interrupted; nothing was written\n"
