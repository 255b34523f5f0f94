"""From every framework to ONNX to int8: source, converter, seconds, difference, then size and accuracy.

    GRAPHOPT_FRAMEWORKS=~/envs python tools/bench/convert.py [--only torch,sklearn] [--json]

Needs an environment per framework (``make frameworks``, or the folder the variable names); those that are not there are
left out and named. The models are trained here, on 300 digits; accuracy is on 297 others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sources import ENVIRONMENTS, SOURCES, Made, feeds, interpreter, make, write_data

import graphopt


def right(outputs: list[dict[str, Any]], samples: list[dict[str, Any]]) -> float:
    """Accuracy of whichever output holds a value per class."""
    hits = 0
    for output, sample in zip(outputs, samples, strict=True):
        scores = next(v for v in output.values() if np.ndim(v) == 2 and np.shape(v)[1] == 10)
        hits += int(np.argmax(scores, axis=1)[0] == np.ravel(sample["label"])[0])
    return hits / len(samples)


def measured(made: Made, folder: Path) -> dict[str, Any]:
    """One source all the way."""
    options: dict[str, Any] = {"allow_code": "--allow-code" in made.options}
    if "--input-shape" in made.options:
        options["input_shapes"] = [made.options[made.options.index("--input-shape") + 1]]
    found: dict[str, Any] = {"source": made.source}
    try:
        result = graphopt.convert(folder / made.source, python=interpreter(made.environment), **options)
    except graphopt.GraphoptError as error:
        return {**found, "error": str(error)}
    source = result.report["source"]
    outputs = result.report["comparison"]["outputs"]
    found |= {
        "framework": source["framework"],
        "converter": source["converter"],
        "seconds": source["seconds"],
        "max_abs": max(output["max_abs"] for output in outputs),
        "onnx_bytes": result.report["output"]["bytes"],
    }
    names = [port["name"] for port in result.report["inputs"]]
    test, calib = np.load(folder / "test.npz"), np.load(folder / "calib.npz")
    data = feeds(calib["image"], made.layout, names)
    judge = {**feeds(test["image"], made.layout, names), "label": test["label"]}
    try:
        done = graphopt.quantize(result.ir_model, data=data, eval_data=judge, metric=right, time=0, allow_slower=True)
    except graphopt.GraphoptError as error:
        simpler = graphopt.optimize(result.ir_model, eval_data=judge, metric=right, time=0)
        report, found["quantized"] = simpler.report, str(error)
    else:
        report, found["quantized"] = done.report, None
    metric = report["metric"]
    return found | {"bytes": report["output"]["bytes"], "before": metric["original"], "after": metric["candidate"]}


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in found:
        return f"| {found['source']} | {found['error'][:120]} | | | | |"
    how = "int8" if found["quantized"] is None else f"optimized ({found['quantized'][:60]}...)"
    tools = f"{found['framework']}, {found['converter']} | {found['seconds']:.0f} | {found['max_abs']:.2g}"
    sizes = f"{found['onnx_bytes'] / 1e3:.1f} -> {found['bytes'] / 1e3:.1f} {how}"
    return f"| {found['source']} | {tools} | {sizes} | {found['before']:.3f} -> {found['after']:.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="environments, separated by commas")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else ENVIRONMENTS
    rows = []
    if not arguments.json:
        print(
            "| source | framework, converter | s | max abs | kB | accuracy |\n| --- | --- | ---: | ---: | --- | --- |"
        )
    with tempfile.TemporaryDirectory(prefix="graphopt-sources-") as scratch:
        folder = Path(scratch)
        write_data(folder)
        for environment in wanted:
            if interpreter(environment) is None:
                print(f"no environment for {environment}; see tools/sources", file=sys.stderr)
                continue
            make(environment, folder)
            for made in (m for m in SOURCES if m.environment == environment):
                rows.append(measured(made, folder))
                if not arguments.json:
                    print(row(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
