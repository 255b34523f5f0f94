"""Groups of channels: what goes together does, what must stay does, and removing what nobody heard changes nothing."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from architectures import ARCHITECTURES, feeds
from prune_exactly import examine


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removing_what_nobody_heard_changes_nothing(name: str) -> None:
    model = ARCHITECTURES[name]()
    found = examine(model, [feeds(model, 1), feeds(model, 2, 24)], random.Random(0))
    assert not found.problems
    assert found.removed >= 4
