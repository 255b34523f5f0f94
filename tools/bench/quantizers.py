"""The other quantizers, each at its own recommended preset: what ``tools/bench/quantize.py`` starts, one at a time.

    PYTHON tools/bench/quantizers.py '["TOOL", "MODEL", "FEEDS.npz", "TARGET", MEMORY_GB]'

Runs in the interpreter that has the package and prints seconds and peak memory as JSON. It must not import graphopt,
which that interpreter has not got.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Feeds = list[dict[str, Any]]


@dataclass(frozen=True)
class Rival:
    """``package``: the environment that has it, "" for our own; ``make(model, feeds, target)`` writes the file."""

    package: str
    make: Callable[[str, Feeds, str], None]


def read_feeds(path: Path) -> Feeds:
    """What ``write_feeds`` of quantize.py wrote: arrays ``index|input``."""
    with np.load(path) as stored:
        found: dict[int, dict[str, Any]] = {}
        for key in stored.files:
            index, _, name = key.partition("|")
            found.setdefault(int(index), {})[name] = stored[key]
    return [found[index] for index in sorted(found)]


def peak_mb() -> float:
    """VmHWM, not getrusage: that one starts at the size of the process we were forked from."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM:")), float("nan"))


def _reader(feeds: Feeds) -> Any:
    """The samples as ONNX Runtime, Quark and ModelOpt want them, from the start again after ``rewind``."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

        def get_first(self) -> dict[str, Any]:
            """What ModelOpt asks for."""
            return feeds[0]

    return Reader()


def _prepared(model: str, folder: str) -> str:
    """As ONNX Runtime's documentation asks before quantizing; the model itself where that fails. Scales per channel
    need opset 13, which its quantizer warns of and leaves to the user."""
    import onnx
    from onnx import version_converter
    from onnxruntime.quantization.shape_inference import quant_pre_process

    loaded = onnx.load(model)
    if next((o.version for o in loaded.opset_import if o.domain in ("", "ai.onnx")), 13) < 13:
        model = str(Path(folder) / "upgraded.onnx")
        onnx.save(version_converter.convert_version(loaded, 17), model)
    target = str(Path(folder) / "prepared.onnx")
    try:
        quant_pre_process(model, target, skip_symbolic_shape=False)
    except Exception:  # symbolic shape inference gives up on some models; the documentation says to leave it out then
        try:
            quant_pre_process(model, target, skip_symbolic_shape=True)
        except Exception:  # then quantizing gets what there is
            return model
    return target


def ort_static(method: str, types: str) -> Rival:
    """``quantize_static`` per channel with one of its calibration methods and pairs of types (``rr``: reduce_range)."""

    def make(model: str, feeds: Feeds, target: str) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        with tempfile.TemporaryDirectory() as folder:
            quantize_static(
                _prepared(model, folder),
                target,
                _reader(feeds),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=types.endswith("rr"),
                activation_type=QuantType.QInt8 if types == "s8s8" else QuantType.QUInt8,
                weight_type=QuantType.QUInt8 if types == "u8u8" else QuantType.QInt8,
                calibrate_method=CalibrationMethod[method],
            )

    return Rival("", make)


def ort_dynamic(model: str, feeds: Feeds, target: str) -> None:
    """``quantize_dynamic`` per channel."""
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(_prepared(model, folder), target, per_channel=True)


def nncf(accurate: bool) -> Rival:
    """The mixed preset, with fast or with accurate bias correction."""

    def make(model: str, feeds: Feeds, target: str) -> None:
        import nncf
        import onnx

        made = nncf.quantize(
            onnx.load(model),
            nncf.Dataset(feeds),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(feeds),
            fast_bias_correction=not accurate,
        )
        onnx.save(made, target)

    return Rival("nncf", make)


def quark(preset: str) -> Rival:
    """AMD Quark with one of its presets for CPU (activations and weights of 8 bits, static)."""

    def make(model: str, feeds: Feeds, target: str) -> None:
        from quark.onnx import ModelQuantizer
        from quark.onnx.quantization.config import Config, get_default_config

        config = Config(global_quant_config=get_default_config(preset))
        ModelQuantizer(config).quantize_model(model, target, _reader(feeds))

    return Rival("quark", make)


def modelopt(method: str) -> Rival:
    """NVIDIA ModelOpt's int8 with one of its calibration methods, on the CPU."""

    def make(model: str, feeds: Feeds, target: str) -> None:
        from modelopt.onnx.quantization import quantize

        quantize(
            model,
            quantize_mode="int8",
            calibration_data_reader=_reader(feeds),
            calibration_method=method,
            calibration_eps=["cpu"],
            output_path=target,
        )

    return Rival("modelopt", make)


def aimet(model: str, feeds: Feeds, target: str) -> None:
    """AIMET's W8A8 with its SQNR observer (``tf_enhanced``), per channel, exported as QDQ."""
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel

    simulated = QuantizationSimModel(onnx.load(model), config_file="default")
    simulated.compute_encodings(feeds)
    onnx.save(simulated.to_onnx_qdq(), target)


def onnxsim(method: str) -> Rival:
    """onnxsim's own static quantizer."""

    def make(model: str, feeds: Feeds, target: str) -> None:
        import onnx
        import onnxsim

        loaded = onnx.load(model)
        try:  # first simplified, without which it sees few weights
            made = onnxsim.quantize_static(onnxsim.simplify(loaded)[0], feeds, method=method)
        except Exception:  # on some models that is what fails
            made = onnxsim.quantize_static(loaded, feeds, method=method)
        onnx.save(made, target)

    return Rival("onnxsim", make)


RIVALS = {
    **{
        f"ort-{method}-{types}": ort_static(method, types)
        for method in ("MinMax", "Entropy", "Percentile")
        for types in ("u8u8", "u8s8-rr", "s8s8")
    },
    "ort-dynamic": Rival("", ort_dynamic),
    "nncf-mixed": nncf(accurate=False),
    "nncf-accurate": nncf(accurate=True),
    "quark": quark("U8S8_AAWS"),
    "modelopt-entropy": modelopt("entropy"),
    "modelopt-max": modelopt("max"),
    "aimet": Rival("aimet", aimet),
    "onnxsim-minmax": onnxsim("minmax"),
    "onnxsim-entropy": onnxsim("entropy"),
}


def work(tool: str, model: str, feeds: str, target: str, memory_gb: float) -> dict[str, Any]:
    """Make one file, on one core; seconds and peak memory."""
    if memory_gb > 0 and sys.platform == "linux":
        import resource

        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if hasattr(os, "sched_setaffinity"):  # not all of them take a number of threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    samples = read_feeds(Path(feeds))
    started = time.perf_counter()
    RIVALS[tool].make(model, samples, target)
    return {"seconds": time.perf_counter() - started, "mb": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(work(*json.loads(sys.argv[1]))))
