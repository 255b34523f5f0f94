"""Would the tests notice if a guard were gone? Takes each away in turn, in a copy of the tree, and looks.

    python tools/guard_mutation.py [--only PART] [--jobs N]

Prints one line per guard and the score; exits 1 where the tests pass without one. Every guard is a text that stands
once in its file (tools/guards.py), so that one that has moved is told rather than skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from guards import GUARDS, Guard

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("graphopt", "passes", "tests", "tools", "pyproject.toml")
LINKED = ("fixtures", "docs", "README.md")


def noticed(guard: Guard) -> tuple[bool, str]:
    """Whether the guard's tests fail without it, and which."""
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for name in LINKED:
            (copy / name).symlink_to(ROOT / name)
        path = copy / guard.file
        text = path.read_text(encoding="utf-8")
        if text.count(guard.before) != 1:
            return False, f"'{guard.before}' stands {text.count(guard.before)} times in {guard.file}: correct guards.py"
        path.write_text(text.replace(guard.before, guard.after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *guard.tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=guard.seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return True, "the tests hang"
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode == 1 and failed:
            return True, failed[0].removeprefix("FAILED ").split(" - ")[0]
        return False, "the tests pass" if done.returncode == 0 else f"pytest exits {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="guards whose name holds this")
    parser.add_argument("--skip", type=int, default=0, help="the first N")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args()
    guards = [guard for guard in GUARDS if chosen.only in guard.name][chosen.skip :]
    started, found = time.monotonic(), 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for guard, (seen, why) in zip(guards, pool.map(noticed, guards), strict=True):
            found += seen
            print(f"{'noticed' if seen else 'MISSED '}  {guard.name:45} {why}", flush=True)
    print(f"{found} of {len(guards)} noticed, {time.monotonic() - started:.0f} s")
    return found < len(guards)


if __name__ == "__main__":
    sys.exit(main())
