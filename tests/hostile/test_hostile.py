"""Every kind of hostile file on two verbs, in a warm process under limits; ``make hostile`` runs it on all of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from hostile.corpus import Kind, data, models
from hostile.oracle import Case
from hostile.pool import Worker, start
from hostile.verbs import quick

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
KINDS = [*models(), *data()]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with start() as found:
        yield found


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 170
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_what_the_page_on_security_names_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    names = {kind.name for kind in KINDS}
    for word in re.findall(r"`((?:external|data|bomb|function|graph|tensor)-[a-z0-9-]*\*?)`", page):
        assert word in names or (word.endswith("*") and any(n.startswith(word[:-1]) for n in names)), word
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for word in re.findall(r"`(test_\w+)`", page):
        assert f"def {word}(" in tests, word
    for path in re.findall(r"`(t(?:ests|ools)/[\w/.]+)", page):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kind(kind: Kind, worker: Worker, tmp_path: Path) -> None:
    case = Case(kind, tmp_path)
    found = [text for line in quick(case) for text in case.problems(worker, line)]
    assert not found, "\n".join(found)
