#!/usr/bin/env python3
"""Make the demo and the test models again: `python tools/make_fixtures.py [--out DIR] [NAME ...]`.

Needs torch, scikit-learn, onnx and onnxscript, not graphopt: the fixtures must not depend on what they test.
Run twice on one machine, it writes the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before torch loads: sums split over threads differ in their last bits.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from fixtures import control, convolutions, digits, exported, forms, record

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = [*exported.FIXTURES, *control.FIXTURES, *convolutions.FIXTURES, *forms.FIXTURES]
MODELS: dict[str, record.Fixture] = {fixture.name: fixture for fixture in FIXTURES}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The names are checked here, since `choices` can't say that none means all."""
    names = [digits.NAME, *MODELS]
    parser = argparse.ArgumentParser(description="Make the demo and the models that the tests run on.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all when left out: {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help="instead of the repository's root")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in names]
    if unknown:
        parser.error(f"no fixture is called {', '.join(unknown)}; there are {', '.join(names)}")
    options.names = options.names or names
    return options


def make(fixture: record.Fixture, root: Path) -> None:
    """Build one model and write it beside its data."""
    model, data = fixture.build()
    record.describe(model, fixture.name, fixture.what)
    record.write_model(model, root / "fixtures" / "models" / f"{fixture.name}.onnx")
    record.write_data(data, root / "fixtures" / "data" / f"{fixture.name}.npz")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what was asked for."""
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in options.names:
        if name == digits.NAME:
            digits.make_demo(options.out / "graphopt" / "demo")
        else:
            make(MODELS[name], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
