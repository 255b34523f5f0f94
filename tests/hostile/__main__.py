"""Every kind on every verb: ``make hostile``. ``--only PART`` of a kind's name; ``--verbs a,b``; ``--part 3/10``.

Verbs are those of the command line, so that a new one is met by every kind of file as soon as it is there. The whole
takes hours of one core: with ``--resume FILE`` what was done is written there, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from hostile.corpus import Kind, data, models  # noqa: E402
from hostile.oracle import Case  # noqa: E402
from hostile.pool import Worker, start  # noqa: E402
from hostile.verbs import command_line, quick, verbs  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--verbs", default="", help="these, with commas between them")
    parser.add_argument("--quick", action="store_true", help="the two verbs of `make test`")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th kind, beginning with the I-th")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="what was done; it is not done again, but counted")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    chosen = parser.parse_args()
    first, step = (int(number) for number in chosen.part.split("/"))
    kinds = [kind for kind in (*models(), *data()) if chosen.only in kind.name][first - 1 :: step]
    wanted = [name for name in chosen.verbs.split(",") if name] or list(verbs())
    runs = [(kind, verb) for kind in kinds for verb in (["quick"] if chosen.quick else wanted)]
    known = {(row["kind"], row["verb"]): row for row in _rows(chosen.resume)}
    done: list[dict[str, Any]] = []
    end = time.monotonic() + chosen.seconds
    with start() as worker:
        for kind, verb in runs:
            row = known.get((kind.name, verb))
            if row is None:
                if time.monotonic() > end:
                    break
                row = one(kind, verb, worker)
                if chosen.resume is not None:
                    with chosen.resume.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
            done.append(row)
            for text in row["wrong"] or ():
                print(f"{kind.name}: {text}", flush=True)
    return _told(done, len(runs) - len(done))


def _rows(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def one(kind: Kind, verb: str, worker: Worker) -> dict[str, Any]:
    """One kind on one verb: ``wrong`` lists what is, and is None where the verb takes no such thing."""
    before = worker.cpu
    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as folder:
        case = Case(kind, Path(folder))
        lines = quick(case) if verb == "quick" else [command_line(verb, case)]
        found = [text for line in lines if line is not None for text in case.problems(worker, line)]
    wrong = None if lines == [None] else found
    return {"kind": kind.name, "verb": verb, "wrong": wrong, "cpu": round(worker.cpu - before, 2)}


def _told(done: list[dict[str, Any]], left: int) -> int:
    """The summary, a line per verb; the exit code."""
    ran = [row for row in done if row["wrong"] is not None]
    bad = [row for row in ran if row["wrong"]]
    print(f"{'verb':12}{'kinds':>6}{'wrong':>6}{'CPU s':>8}{'longest':>9}")
    count, wrong = Counter(row["verb"] for row in ran), Counter(row["verb"] for row in bad)
    for verb in count:
        rows = [row for row in ran if row["verb"] == verb]
        longest = max(rows, key=lambda row: row["cpu"])
        spent = sum(row["cpu"] for row in rows)
        print(f"{verb:12}{count[verb]:6}{wrong[verb]:6}{spent:8.0f}{longest['cpu']:9.1f}  {longest['kind']}")
    kinds = len({row["kind"] for row in ran})
    print(f"{kinds} kinds, {len(ran)} runs, {len(bad)} of them wrong, {sum(row['cpu'] for row in ran):.0f} CPU s")
    if left:
        print(f"{left} runs are left")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
