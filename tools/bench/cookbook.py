"""The figures of the cookbook: a model's size and accuracy in float, by its framework's own tool, and by graphopt.

    python tools/bench/cookbook.py [--only torch]

Needs the environments of ``make frameworks`` that the roads name. Models are trained here on 300 digits; calibration
has others, accuracy is on 297 that nothing saw. theirs.json, beside the models, has what the framework's tool makes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sources import interpreter, make, write_data

import graphopt

Step = Callable[[Any, Path], Any]
QUICK = {"metric": "accuracy", "max_drop": "1%", "time": 0}


@dataclass(frozen=True)
class Road:
    """A page's model and what the page does with it; ``theirs`` names the other tool."""

    environment: str
    source: str
    key: str
    theirs: str
    ours: str
    step: Step
    shapes: tuple[str, ...] = ()


def _static(layout: str, **options: Any) -> Step:
    def step(model: Any, folder: Path) -> Any:
        data, judge = folder / f"calib_{layout}.npz", folder / f"test_{layout}.npz"
        made = graphopt.quantize(model, data=data, eval_data=judge, allow_slower=True, **QUICK, **options)
        made.report["metric"]["candidate"] = _accuracy(made, judge)
        return made

    return step


def _accuracy(made: Any, judge: Path) -> float:
    """On all of the samples, whatever number of them judged."""
    return float(
        graphopt.compare(made.ir_model, made.ir_model, data=judge, metric="accuracy").report["metric"]["candidate"]
    )


def _dynamic(model: Any, folder: Path) -> Any:
    judge = folder / "test_tokens.npz"
    return graphopt.quantize(model, mode="dynamic", eval_data=judge, allow_slower=True, **QUICK)


def _int4(model: Any, folder: Path) -> Any:
    data, judge = folder / "calib_tokens.npz", folder / "test_tokens.npz"
    return graphopt.compress(model, weights="int4", data=data, eval_data=judge, **QUICK)


ROADS = (
    Road("torch", "resnet.py:make", "resnet", "torch quantize_dynamic", "static int8", _static("rgb", samples=100),
         ("x:batch,3,32,32",)),
    Road("torch", "bert", "bert", "torch quantize_dynamic", "dynamic int8", _dynamic),
    Road("torch", "bert", "bert", "torch quantize_dynamic", "int4 weights", _int4),
    Road("tensorflow", "mobilenet.keras", "mobilenet", "TFLite converter, int8", "static int8", _static("rgb_nhwc")),
)  # fmt: skip


def row(road: Road, folder: Path) -> str:
    """One line of the table."""
    theirs = json.loads((folder / "theirs.json").read_text())[road.key]
    source = folder / road.source
    model = graphopt.convert(source, python=interpreter(road.environment), input_shapes=road.shapes).ir_model
    try:
        report = road.step(model, folder).report
    except graphopt.GraphoptError as error:
        return f"| {road.source} | {error} | | |"
    metric = report["metric"]
    cells = [
        ("float", theirs["float_bytes"], theirs["float_accuracy"]),
        (road.theirs, theirs["theirs_bytes"], theirs["theirs_accuracy"]),
        (f"graphopt, {road.ours}", report["output"]["bytes"], metric["candidate"]),
    ]
    told = " | ".join(f"{name}: {size / 1e3:.0f} kB, {accuracy:.3f}" for name, size, accuracy in cells)
    return f"| {road.source} | {told} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graphopt-cookbook-") as scratch:
        for environment in dict.fromkeys(road.environment for road in ROADS):
            if arguments.only not in (None, environment):
                continue
            if interpreter(environment) is None:
                print(f"no environment for {environment}; see make frameworks", file=sys.stderr)
                continue
            folder = Path(scratch) / environment
            folder.mkdir()
            write_data(folder)
            make(environment, folder)
            for road in ROADS:
                if road.environment == environment:
                    print(row(road, folder), flush=True)


if __name__ == "__main__":
    main()
