"""Run the commands whose output the README shows, and paste it there.

    python tools/update_readme.py [demo] [real] [budget]

Nothing in the README's figures is typed by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

COMMANDS = {
    "demo": [sys.executable, "-m", "graphopt", "demo", "-o", "demo-out"],
    "real": [sys.executable, "tools/bench/real_models.py"],
    "budget": [
        sys.executable, "tools/bench/real_models.py", "--models", "basic-pitch,efficientnet-lite0,minilm",
        "--", "--max-drop", "1%",
    ],
}  # fmt: skip


def main() -> int:
    """Replace what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""
    for name in sys.argv[1:] or COMMANDS:
        done = subprocess.run(
            COMMANDS[name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        output = done.stdout.strip("\n").replace(str(ROOT) + "/", "")
        block = output if output.startswith("|") else f"```\n{output}\n```"
        text = README.read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            print(f"README.md has no place for '{name}'", file=sys.stderr)
            return 1
        README.write_text(pattern.sub(lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text), encoding="utf-8")
        print(f"{name}: pasted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
