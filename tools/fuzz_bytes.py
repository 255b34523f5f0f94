"""Damages models and data of the hostile corpus at random, and holds graphopt to what it promises of every file.

    python tools/fuzz_bytes.py [--seconds 600] [--seed 0] [--keep FOLDER] [--verbs optimize,inspect]

Half of the damage is bytes (flipped, cut, inserted, spliced with another seed), half is structure: a field dropped, an
entry doubled or moved, a name swapped for another, a number or type changed for a hostile one. Each file goes through
the verbs in a warm worker under limits (tests/hostile); what breaks a promise is printed and kept, with the seed that
makes it again. Prints how many files were tried; exits 1 where there was a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS)]

from hostile.corpus import ANY, Kind, data, models  # noqa: E402
from hostile.oracle import Case  # noqa: E402
from hostile.pool import Worker, start  # noqa: E402
from hostile.verbs import command_line, quick  # noqa: E402

_LARGEST = 20_000
NUMBERS = (0, 1, -1, 2, 7, 64, 127, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31))
Rng = np.random.Generator


def seeds() -> list[tuple[str, bytes]]:
    """Small files of the corpus: (name of the file, its bytes)."""
    found = []
    for kind in (*models(), *data()):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            work = Path(folder) / "work"
            work.mkdir()
            name = kind.write(work)
            path = work / name
            if kind.options or len(name) > 100 or "\0" in name or not path.is_file() or path.is_symlink():
                continue
            if path.stat().st_size <= _LARGEST:
                found.append((name, path.read_bytes()))
    return found


def damaged(content: bytes, other: bytes, rng: Rng) -> bytes:
    """Bytes flipped, cut out, put in, or joined with another file's."""
    found = bytearray(content or b"\0")
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(found) or 1))
        end = at + int(rng.integers(1, 20))
        choice = int(rng.integers(5))
        if choice == 0 and found:
            found[at % len(found)] = int(rng.integers(256))
        elif choice == 1:
            del found[at:end]
        elif choice == 2:
            found[at:at] = rng.bytes(int(rng.integers(1, 12)))
        elif choice == 3:
            found[at:at] = found[at:end]
        else:
            found = found[:at] + other[int(rng.integers(len(other) or 1)) :]
    return bytes(found)


def messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all that it holds."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                yield from messages(one)


def restructured(content: bytes, rng: Rng) -> bytes | None:
    """A model with a few of its fields changed; None where it does not parse."""
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception:  # not a model, or damaged before
        return None
    for _ in range(int(rng.integers(1, 4))):
        every = list(messages(proto))
        message = every[int(rng.integers(len(every)))]
        fields = message.ListFields()
        if fields:
            with contextlib.suppress(UnicodeDecodeError):  # a text that is none is not put back either
                _change(message, *fields[int(rng.integers(len(fields)))], every, rng)
    return bytes(proto.SerializeToString())


def _change(message: Any, field: Any, value: Any, every: list[Any], rng: Rng) -> None:
    choice = int(rng.integers(4))
    if choice == 0:
        message.ClearField(field.name)
    elif field.is_repeated:
        entries = list(value)
        at = int(rng.integers(len(entries)))
        if choice == 1:
            entries.append(entries[at])
        elif choice == 2:
            del entries[at]
        else:
            entries.insert(int(rng.integers(len(entries))), entries.pop(at))
        copies = [_copy(entry) for entry in entries]
        message.ClearField(field.name)
        getattr(message, field.name).extend(copies)
        if choice == 3 and field.message_type is None and copies:
            getattr(message, field.name)[0] = _other(copies[0], every, rng)
    elif field.message_type is None:
        try:
            setattr(message, field.name, _other(value, every, rng))
        except (ValueError, TypeError):  # an enumeration, a number too large for its field, a text that is none
            message.ClearField(field.name)


def _copy(value: Any) -> Any:
    if not hasattr(value, "CopyFrom"):
        return value
    copy = type(value)()
    copy.CopyFrom(value)
    return copy


def _other(value: Any, every: list[Any], rng: Rng) -> Any:
    """Another value of the same kind, one that hurts."""
    if isinstance(value, str):
        names = [m.name for m in every if getattr(m, "name", "")] + ["", "x", "y", "../x", "a\nb", "n" * 3000]
        return names[int(rng.integers(len(names)))]
    if isinstance(value, bytes):
        return value[: int(rng.integers(len(value) + 1))]
    if isinstance(value, float):
        return float(("nan", "inf", "-0.0", "1e38")[int(rng.integers(4))])
    return NUMBERS[int(rng.integers(len(NUMBERS)))]


def one(name: str, content: bytes, worker: Worker, verbs: list[str], label: str) -> list[str]:
    """What is wrong with what the verbs make of a file."""

    def write(folder: Path, _: object) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return name

    is_model = name == "m.onnx"
    kind = Kind(label if is_model else f"data-{label}", write, ANY, ANY)
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        case = Case(kind, Path(folder))
        lines = [line for verb in verbs if (line := command_line(verb, case))] if verbs else quick(case)
        return [text for line in lines for text in case.problems(worker, line)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--verbs", default="", help="instead of the two of `make test`")
    chosen = parser.parse_args()
    verbs = [name for name in chosen.verbs.split(",") if name]
    pool = seeds()
    started, tried, findings = time.monotonic(), 0, 0
    with start() as worker:
        while time.monotonic() - started < chosen.seconds:
            rng = np.random.default_rng((chosen.seed, tried))
            name, content = pool[int(rng.integers(len(pool)))]
            made = restructured(content, rng) if rng.integers(2) and name == "m.onnx" else None
            if made is None:
                made = damaged(content, pool[int(rng.integers(len(pool)))][1], rng)
            label = f"fuzz-{chosen.seed}-{tried}"
            found = one(name, made, worker, verbs, label)
            tried += 1
            if found:
                findings += 1
                chosen.keep.mkdir(parents=True, exist_ok=True)
                (chosen.keep / f"{label}{Path(name).suffix}").write_bytes(made)
                print(f"{label} ({name}): {found[0][:500]}", flush=True)
    print(f"{tried} files from {len(pool)} seeds, {findings} findings, {time.monotonic() - started:.0f} s")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
