"""What is reported of the ranges that calibration chose: how each value is spread, and what its range cuts off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from graphopt.observers import clipped_share, linear_histogram, quantization_sqnr
from graphopt.passes._qdq import Affine
from graphopt.statistics import Statistics

LISTED = 64
"""Values reported, lowest SQNR first; how many more there are is reported, too."""


def chosen_ranges(ranges: Mapping[ir.Value, Affine], statistics: Statistics) -> dict[str, Any]:
    """``ranges`` and ``ranges_left_out``, two metrics of a pass that calibrates."""
    noise = []
    for value, chosen in ranges.items():
        sqnr = quantization_sqnr(statistics.values[value.name or ""], chosen.low, chosen.high)
        noise.append((sqnr, value.name or "", chosen))
    noise.sort(key=lambda one: one[0])  # stable: values of one SQNR stay in order of execution
    listed = []
    for sqnr, name, chosen in noise[:LISTED]:
        seen = statistics.values[name]
        half = chosen.scale / 2  # nearer than this to an end is rounding, no clipping
        low, high, histogram = linear_histogram(seen)
        about = {
            "value": name,
            "low": chosen.low,
            "high": chosen.high,
            "min": low,
            "max": high,
            "clipped": clipped_share(seen, chosen.low - half, chosen.high + half),
            "sqnr_db": sqnr if math.isfinite(sqnr) else None,
            "histogram": histogram,
        }
        listed.append(about)
    return {"ranges": listed, "ranges_left_out": len(noise) - len(listed)}
