"""Every kind on every verb: ``make hostile``. ``--only PART`` of a kind's name; ``--verbs a,b``.

Verbs are those of the command line, so that a new one is met by every kind of file as soon as it is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from hostile.corpus import Kind, data, models  # noqa: E402
from hostile.oracle import Case  # noqa: E402
from hostile.pool import Worker, start  # noqa: E402
from hostile.verbs import command_line, quick, verbs  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--verbs", default="")
    parser.add_argument("--quick", action="store_true", help="the two verbs of `make test`")
    chosen = parser.parse_args()
    kinds = [kind for kind in (*models(), *data()) if chosen.only in kind.name]
    wanted = [name for name in chosen.verbs.split(",") if name] or list(verbs())
    bad, count, started = 0, 0, time.monotonic()
    slow: list[tuple[float, str]] = []
    with start() as worker:
        for kind in kinds:
            for verb in ["quick"] if chosen.quick else wanted:
                before = time.monotonic()
                found = one(kind, verb, worker)
                if found is None:
                    continue
                count += 1
                slow.append((time.monotonic() - before, f"{kind.name} {verb}"))
                bad += bool(found)
                for text in found:
                    print(f"{kind.name}: {text}", flush=True)
    print(f"{len(kinds)} kinds, {count} runs, {bad} of them wrong, {time.monotonic() - started:.0f} s")
    for seconds, name in sorted(slow)[-8:]:
        print(f"  {seconds:5.1f} s {name}")
    return bool(bad)


def one(kind: Kind, verb: str, worker: Worker) -> list[str] | None:
    """The problems of one kind on one verb; None where the verb takes no such thing."""
    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as folder:
        case = Case(kind, Path(folder))
        if verb == "quick":
            return [text for line in quick(case) for text in case.problems(worker, line)]
        arguments = command_line(verb, case)
        return None if arguments is None else case.problems(worker, arguments)


if __name__ == "__main__":
    sys.exit(main())
