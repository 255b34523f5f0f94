"""How much memory the verbs take on a model whose weights are large: inspect, diff, optimize, compare, compress.

    python tools/bench/memory.py --size 2GB [--verbs inspect,diff] [--folder /tmp/work]

Two synthetic decoders (tools/decoder.py) of the same shapes and other weights are made in --folder and taken away
again. Each verb runs as its command line does, in a process of its own. Two figures are told of it and of processes it
starts: the most memory that was their own (anonymous: what a machine must have), and the high-water mark of resident
memory, pages of mapped files included (which the system takes back when it wants them).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from graphopt.gates import parse_size  # noqa: E402
from graphopt.report.units import size as in_words  # noqa: E402
from tools import decoder  # noqa: E402

VERBS = ("inspect", "inspect --deep", "diff", "compare", "optimize", "compress")
_EVERY = 0.02


def arguments(verb: str, a: Path, b: Path, out: Path) -> list[str]:
    """The command line of one verb."""
    known = {
        "inspect": ["inspect", a],
        "inspect --deep": ["inspect", a, "--deep"],
        "diff": ["diff", a, b],
        "compare": ["compare", a, b, "--samples", "1"],
        "optimize": ["optimize", a, "-o", out, "--time", "0"],
        "compress": ["compress", a, "-o", out, "--weights", "int4", "--rounding", "nearest", "--memory", "1"],
    }
    return [str(word) for word in known[verb]]


def watched(command: list[str]) -> tuple[int, str, int, int, float]:
    """Run it; (exit code, the end of its stderr, most anonymous bytes, most resident bytes, seconds)."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=told, text=True)
        own = resident = 0
        while process.poll() is None:
            tree = _tree(process.pid)
            own = max(own, sum(_status(pid, "RssAnon") for pid in tree))
            resident = max(resident, *(_status(pid, "VmHWM") for pid in tree))
            time.sleep(_EVERY)
        took = time.perf_counter() - started
        told.seek(0)
        return process.returncode, told.read()[-400:].strip(), own, resident, took


def _tree(pid: int) -> list[int]:
    """A process and those it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        children = []
    return [pid, *(one for child in children for one in _tree(int(child)))]


def _status(pid: int, key: str) -> int:
    """Bytes as /proc says them; 0 once the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    verbs = given.verbs.split(",")
    work = Path(tempfile.mkdtemp(prefix="graphopt-memory-", dir=given.folder))
    try:
        a, b = work / "a.onnx", work / "b.onnx"
        made = decoder.make(a, parse_size(given.size, 1), hidden=given.hidden)
        if {"diff", "compare"} & set(verbs):
            decoder.make(b, parse_size(given.size, 1), hidden=given.hidden, seed=1)
        print(f"{in_words(made)} of weights in each model\n")
        print("| verb | exit | its own memory | resident | time |\n| --- | ---: | ---: | ---: | ---: |")
        for verb in verbs:
            folder = Path(tempfile.mkdtemp(dir=work))
            command = [sys.executable, "-m", "graphopt", *arguments(verb, a, b, folder / "out.onnx")]
            code, told, own, resident, took = watched(command)
            shutil.rmtree(folder)
            print(f"| {verb} | {code} | {in_words(own)} | {in_words(resident)} | {took:.1f} s |", flush=True)
            if told:
                print(f"  {told}", file=sys.stderr)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
