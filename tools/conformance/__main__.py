"""Every exact pass by itself, the default pipeline, and the other simplifiers, over onnx.backend.test in six variants.

    python -m tools.conformance [CONTESTANT]... [--rivals --rival-python PATH] [--every N] [--variant NAME]...

A CONTESTANT is `pipeline`, a pass, or a rival; without one: the pipeline and all exact passes. Prints one row per
contestant (docs/conformance.md says what the columns count), then every failure of ours by name, and what verification
took back ("undone", no failure). Exits 1 where one of ours failed; failures of rivals are counted only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graphopt.errors import InputError
from tools.conformance.cases import KINDS, VARIANTS, Source, make, sources
from tools.conformance.contestants import ASKED_FOR, Contestant, Rival, contestant, exact_passes
from tools.conformance.judging import COLUMNS, Finding, Reference
from tools.conformance.rivals import PACKAGES

HEAD = ("models", "changed", *COLUMNS)


@dataclass
class Tally:
    """What happened, counted per contestant and column, and in words (``ours``: without the rivals' part)."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    ours: list[str] = field(default_factory=list)

    def failed(self, contestants: Iterable[Contestant]) -> bool:
        """Whether anything is wrong with the models that one of ours made."""
        return any(self.counts[w.name, c] for w in contestants if not isinstance(w, Rival) for c in COLUMNS)


def judge(reference: Reference, who: Contestant) -> tuple[bool, list[Finding], str]:
    """(whether the model was changed, what is wrong with it, what verification took back)."""
    answer = who.answer(reference)
    if answer.finding is not None:
        # What ONNX Runtime does not take is no fault of an optimizer that is ONNX Runtime.
        excused = who.name.startswith("ort-") and answer.finding[0] == "crashed" and reference.ran is None
        return False, [] if excused else [answer.finding], ""
    found = [("mutated", "")] if answer.mutated else []
    if answer.model is None:
        return False, found, answer.undone
    found += reference.findings(answer.model, rounding=who.rounding)
    changed = reference.changed(answer.model)
    return changed, [f for f in found if f[0] not in ASKED_FOR.get(who.name, ())], answer.undone


def run_case(source: Source, contestants: Sequence[Contestant], variants: Sequence[str], tally: Tally) -> None:
    """One case in all variants through all contestants."""
    for variant in variants:
        made = make(source, variant)
        if made is None:
            continue
        reference = Reference(*made)
        for who in contestants:
            changed, found, undone = judge(reference, who)
            tally.counts[who.name, "models"] += 1
            tally.counts[who.name, "changed"] += changed
            tally.counts.update({(who.name, column) for column, _ in found})
            where = f"{who.name} on {source.name} [{variant}]"
            lines = [f"{column}: {where}: {why}" for column, why in found]
            lines += [f"undone: {where}: {undone}"] if undone else []
            tally.lines += lines
            if not isinstance(who, Rival):
                tally.ours += lines


def table(tally: Tally, contestants: Sequence[Contestant]) -> Iterator[str]:
    """The rows to print, in Markdown."""
    rows = [["", *HEAD]]
    for who in contestants:
        name = f"{who.name} {who.version}".strip()
        rows.append([name, *(str(tally.counts[who.name, column]) for column in HEAD)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contestants", nargs="*", metavar="CONTESTANT", help=f"of the rivals: {', '.join(PACKAGES)}")
    parser.add_argument("--rivals", action="store_true", help="all rivals too")
    parser.add_argument("--rival-python", type=Path, help="the interpreter that has them (default: this one)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case")
    parser.add_argument("--start", type=int, default=0, metavar="K", help="from the Kth on: N runs cover all")
    parser.add_argument("--variant", dest="variants", action="append", choices=list(VARIANTS))
    parser.add_argument("--kind", dest="kinds", action="append", choices=KINDS)
    parser.add_argument("--failures", type=Path, metavar="FILE", help="write all failures there, as they come")
    options = parser.parse_args(arguments)
    if options.every < 1 or options.start < 0:
        parser.error("--every and --start count cases: give 1 or more, and 0 or more")
    names = list(options.contestants) or ([] if options.rivals else ["pipeline", *exact_passes()])
    names += [name for name in PACKAGES if options.rivals and name not in names]
    try:
        asked = [contestant(name, options.rival_python) for name in names]
    except (InputError, OSError) as error:
        parser.error(str(error))
    missing = [who for who in asked if isinstance(who, Rival) and not who.there]
    present = [who for who in asked if who not in missing]
    chosen = sources(tuple(options.kinds or KINDS))[options.start :: options.every]
    tally = Tally()
    started = time.monotonic()
    with Path(options.failures or os.devnull).open("w", encoding="utf-8") as file:
        for number, source in enumerate(chosen, 1):
            told = len(tally.lines)
            run_case(source, present, options.variants or list(VARIANTS), tally)
            print(*tally.lines[told:], sep="\n", end="\n" * (len(tally.lines) > told), file=file, flush=True)
            if number % 50 == 0:
                print(
                    f"{number} of {len(chosen)} cases, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
                )
    print(f"{len(chosen)} cases, every {options.every} from {options.start} on\n")
    print("\n".join([*table(tally, present), *(f"{who.name}: not installed" for who in missing), *tally.ours]))
    return 1 if tally.failed(present) else 0


if __name__ == "__main__":
    sys.exit(main())
