"""What the pass tests share: small models, one pass through the manager, and running the outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.base import Context, Pass
from graphopt.data import load_data
from graphopt.ledger import LedgerEntry
from graphopt.manager import PassManager
from graphopt.model import interface, load, to_proto
from graphopt.session import Session
from graphopt.statistics import collect

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "fixtures" / "models"
DATA = ROOT / "fixtures" / "data"
DEMO = ROOT / "graphopt" / "demo"

Feeds = Mapping[str, np.ndarray]


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str] | Mapping[str, Sequence[int | str]],
    weights: Mapping[str, Any] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
    out_dtype: int | None = None,
    inputs_too: bool = False,
    domains: Iterable[str] = (),
) -> onnx.ModelProto:
    """A model; ``inputs_too`` lists the weights as graph inputs, as IR 3 wants."""
    arrays = {name: np.asarray(value) for name, value in (weights or {}).items()}
    infos = [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()]
    if inputs_too:
        infos += [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
        ]
    graph = helper.make_graph(
        list(nodes),
        "g",
        infos,
        [
            helper.make_tensor_value_info(
                n, dtype if out_dtype is None else out_dtype, outputs[n] if isinstance(outputs, Mapping) else None
            )
            for n in outputs
        ],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def node(op_type: str, inputs: Sequence[str], outputs: Sequence[str] | str, **attributes: Any) -> onnx.NodeProto:
    """A node named after its first output."""
    made = [outputs] if isinstance(outputs, str) else list(outputs)
    attributes.setdefault("name", f"n_{made[0]}")
    return helper.make_node(op_type, list(inputs), made, **attributes)


def apply(
    proto: Any, pass_: Pass, *, data: Sequence[Feeds] | None = None, verify: str = "end", **context: Any
) -> tuple[onnx.ModelProto, LedgerEntry]:
    """One pass through the manager; the outcome and its ledger entry. The caller's model is checked to be untouched."""
    model = load(proto)
    before = to_proto(model).SerializeToString(deterministic=True)
    made = Context(original=model, threads=1, **context)
    if data is not None:
        feeds = [dict(f) for f in data]
        made.data = load_data(feeds, interface(model)[0])
        made.collect = lambda changed, names, histograms: collect(
            changed, names, feeds, histograms=histograms, threads=1
        )
    result = PassManager([pass_], verify=verify, raise_preconditions=True).run(model, made)
    assert to_proto(model).SerializeToString(deterministic=True) == before
    entry = result.ledger[0]
    assert "reverted" not in entry.status, entry.reason
    return to_proto(result.model), entry


def run(proto: onnx.ModelProto, feeds: Feeds, *, optimize: bool = False) -> dict[str, np.ndarray]:
    return Session(proto, optimize=optimize, threads=1).run(dict(feeds))


def ops(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


def reasons(entry: LedgerEntry) -> dict[str, str]:
    return {s.site: s.reason for s in entry.skipped}


def size(proto: onnx.ModelProto) -> int:
    return len(proto.SerializeToString())


def initializers(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def fixture_feeds(name: str, count: int | None = None) -> list[dict[str, np.ndarray]]:
    """Samples of a fixture, one by one, with their batch axis."""
    with np.load(DATA / f"{name}.npz") as stored:
        arrays = {k: stored[k] for k in stored.files}
    total = len(next(iter(arrays.values())))
    return [{k: a[i : i + 1] for k, a in arrays.items()} for i in range(min(total, count or total))]


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    signal = float(np.square(reference.astype(np.float64)).sum())
    noise = float(np.square(reference.astype(np.float64) - other.astype(np.float64)).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))


def optimized(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph ONNX Runtime really runs, its optimizations on."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.intra_op_num_threads = 1
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")
