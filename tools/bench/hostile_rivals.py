"""What other tools make of the hostile corpus: every kind of model file, one tool at a time, under the same limits.

    python tools/bench/hostile_rivals.py --python VENV/bin/python [--tools checker,ort,...] [--part 1/10]

Each file is given to the tool in a process of its own, forked from one that imported the tool, under 2 GB and 20 CPU
seconds. ``survived``: no crash, no hang, not out of memory, nothing changed beside the input or in the working folder,
and nothing of what lies outside came out. ``as it should be``: besides, what is good is taken and what graphopt refuses
raises an error; of random damage and of what no runtime here can run, either will do. Where graphopt is stricter than
the standard asks, that counts against a tool that is not, so the two numbers are printed side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TOOLS = ("checker", "ort", "onnxsim", "onnxslim", "polygraphy")
MEMORY, CPU_SECONDS, WALL_SECONDS = 2 * 10**9, 20, 60
RAISED = 9
"""Exit code of a tool that raised an error; in its output stands which."""
_MEMORY_WORDS = ("MemoryError", "bad_alloc", "Failed to allocate memory", "length_error")


# In the other interpreter: nothing of graphopt is there


def use(tool: str, path: str, out: str) -> None:
    """What somebody with a file would do."""
    import onnx

    if tool == "checker":
        onnx.checker.check_model(path, full_check=True)
    elif tool == "ort":
        import onnxruntime

        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    elif tool == "onnxsim":
        import onnxsim

        onnx.save(onnxsim.simplify(path)[0], out)
    elif tool == "onnxslim":
        import onnxslim

        onnx.save(onnxslim.slim(path), out)
    else:
        from polygraphy.backend.onnx import fold_constants, onnx_from_path

        onnx.save(fold_constants(onnx_from_path(path)), out)


def serve(tool: str) -> None:
    """Requests as lines of JSON: ``path``, ``out``, ``folder``, ``said``; answers likewise."""
    modules = {"checker": "onnx.checker", "ort": "onnxruntime", "polygraphy": "polygraphy.backend.onnx"}
    __import__(modules.get(tool, tool))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _one(tool, request)
        print(json.dumps(_waited(child)), flush=True)


def _one(tool: str, request: dict[str, str]) -> None:
    os.setsid()
    os.chdir(request["folder"])
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    code = 0
    try:
        use(tool, request["path"], request["out"])
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}"[:5000].encode("utf-8", "replace"))
        code = RAISED
    os._exit(code)


def _waited(child: int) -> dict[str, Any]:
    end = time.monotonic() + WALL_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status)}
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"code": -int(signal.SIGXCPU)}


# Here


def judged(kind: Any, answer: dict[str, Any], said: str, case: Any, before: dict[str, Any]) -> tuple[bool, bool, str]:
    """(survived, as it should be, why not)."""
    from hostile.corpus import ANY, REFUSED, UNRUN
    from hostile.escapes import SECRET
    from hostile.oracle import contents_of

    code = answer["code"]
    if code in (-int(signal.SIGXCPU), -int(signal.SIGKILL)):
        return False, False, "hangs"
    if code not in (0, RAISED):
        return False, False, f"crashes ({signal.Signals(-code).name if code < 0 else code})"
    if any(word in said for word in _MEMORY_WORDS):
        return False, False, "takes all memory"
    out = [file for file in case.out.iterdir() if file.is_file()]
    if SECRET[:8] in said or any(SECRET.encode()[:8] in file.read_bytes() for file in out):
        return False, False, "leaks"
    if contents_of(case.work) != before or any(case.here.iterdir()):
        return False, False, "leaves or changes files"
    if kind.outcome in (ANY, UNRUN) or (code == RAISED) == (kind.outcome == REFUSED):
        return True, True, ""
    return True, False, "refuses what is good" if code == RAISED else "takes what is broken"


def measured(tool: str, python: str, kinds: list[Any], verbose: bool) -> Counter[str]:
    """Counts of one tool."""
    from hostile.oracle import Case, contents_of

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [python, str(Path(__file__).resolve()), "--serve", tool]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready", f"{tool} does not import in {python}"
        counts: Counter[str] = Counter()
        for kind in kinds:
            with tempfile.TemporaryDirectory(prefix="rival-", ignore_cleanup_errors=True) as folder:
                case = Case(kind, Path(folder))
                before, said = contents_of(case.work), Path(folder) / "said"
                path = case.path()
                if "\0" in path:
                    continue
                request = {"path": path, "out": str(case.out / "o.onnx"), "folder": str(case.here), "said": str(said)}
                print(json.dumps(request), file=process.stdin, flush=True)
                answer = json.loads(process.stdout.readline())
                text = said.read_text("utf-8", "replace") if said.exists() else ""
                survived, right, why = judged(kind, answer, text, case, before)
                counts.update(kinds=1, survived=survived, right=right)
                counts[why] += 1
                if why and verbose:
                    print(f"  {kind.name}: {why}: {' '.join(text.split())[-150:]}", flush=True)
        process.stdin.close()
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--python", help="an interpreter that has the tools")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th kind, beginning with the I-th")
    parser.add_argument("-v", "--verbose", action="store_true", help="name what is not as it should be")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve)
        return
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "tests"), str(root)]
    from hostile.corpus import models

    first, step = (int(number) for number in chosen.part.split("/"))
    kinds = [kind for kind in models() if not kind.options][first - 1 :: step]
    print(f"{'tool':12}{'kinds':>6}{'survived':>10}{'as it should be':>17}", flush=True)
    for tool in chosen.tools.split(","):
        counts = measured(tool, chosen.python or sys.executable, kinds, chosen.verbose)
        why = ", ".join(
            f"{n} {name}" for name, n in counts.most_common() if name not in ("kinds", "survived", "right", "")
        )
        print(f"{tool:12}{counts['kinds']:6}{counts['survived']:10}{counts['right']:17}  {why}", flush=True)


if __name__ == "__main__":
    main()
