"""tools/guards.py names code that is there: a guard that has moved would be taken away by nobody."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from guards import GUARDS, Guard


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_stands_where_it_is_said_to(guard: Guard) -> None:
    assert (ROOT / guard.file).read_text("utf-8").count(guard.before) == 1
    assert guard.after != guard.before
