"""ONNX Runtime (nothing else here imports it): run, tap values, profile, isolate in a child."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graphopt import watching
from graphopt.aborts import fatal
from graphopt.costing import NOTHING, Estimate, check_runnable
from graphopt.errors import OverBudget, RuntimeFailure
from graphopt.lifting import Handed, with_taps
from graphopt.pieces import PIECE, Pieces, in_files
from graphopt.references import referring
from graphopt.residue import graphs
from graphopt.storage import INLINE_LIMIT, save

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

Feeds = Mapping[str, "NDArray[Any]"]
Outputs = dict[str, "NDArray[Any]"]


class Runs(Protocol):
    """Whatever answers feeds as a session does."""

    def run(self, feeds: Feeds, /) -> Outputs: ...


# From 1.32 on ONNX Runtime reports to its maker from Linux and macOS too, and keeps an identifier in the home folder,
# unless this is set before it is loaded. Nobody who optimizes a model has asked for that; whoever did can set it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_OPTIMIZED = "optimized.onnx"


def runtime_version() -> str:
    """ONNX Runtime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


@dataclass(frozen=True)
class Loadable:
    """A model as the runtime takes it, for several sessions: writing out 100,000 nodes takes a second.

    ``source``: bytes where protobuf can, else a path in ``scratch``; ``folder``: what references are relative to.
    """

    source: bytes | str
    folder: Path | None
    convolutions: bool
    scratch: tempfile.TemporaryDirectory[str] | None = None
    estimate: Estimate = NOTHING
    lifted: Mapping[str, Handed] = field(default_factory=dict)
    pieces: onnx.ModelProto | None = None
    """The same again, where it is to be run in pieces."""
    fatal: str | None = None
    """Why the runtime's optimizations must not see it."""


def loadable(
    model: ir.Model | onnx.ModelProto,
    *,
    taps: Sequence[str] = (),
    outputs: bool = True,
    sizes: Sequence[onnx.NodeProto] = (),
) -> Loadable:
    """``model`` written out for :class:`Session`, whose options these are.

    Raises:
        ModelError: as :func:`graphopt.model.to_proto`.
        RuntimeFailure: it cannot be written.
        OverBudget: it would take more than a model of its size may.
    """
    import onnx_ir as ir

    proto, folder = referring(model) if isinstance(model, ir.Model) else (model, None)
    estimate = check_runnable(model, proto) if isinstance(model, ir.Model) else NOTHING
    if sizes:
        proto.graph.node.extend(sizes)
    lifted: dict[str, Handed] = {}
    if taps or not outputs:
        proto, lifted = with_taps(proto, taps, keep_outputs=outputs)
    convolutions, deadly = any(node.op_type == "Conv" for node in proto.graph.node), fatal(proto.graph)
    try:
        if sum(len(t.raw_data) for t in proto.graph.initializer) < INLINE_LIMIT:
            pieces = proto if folder is not None and in_files(proto) > PIECE else None
            return Loadable(
                bytes(proto.SerializeToString()), folder, convolutions, None, estimate, lifted, pieces, deadly
            )
        scratch = tempfile.TemporaryDirectory(prefix="graphopt-")
        path = Path(scratch.name) / "model.onnx"
        save(ir.from_proto(proto), path, external=True)
    except Exception as error:  # protobuf and onnx-ir raise whatever they met
        raise _not_loaded(error) from error
    return Loadable(str(path), folder, convolutions, scratch, estimate, lifted, fatal=deadly)


def _not_loaded(error: Exception) -> RuntimeFailure:
    return RuntimeFailure(f"ONNX Runtime cannot load the model: {one_line(error)}")


class Session:
    """One model loaded in ONNX Runtime on the CPU.

    ``optimize`` False turns the runtime's own graph optimizations off (the reference); ``threads`` None leaves the
    choice to the runtime; ``taps`` are names of inner values returned beside the outputs (``outputs`` False: instead
    of them), those in bodies too: of an If's branch (float32 only) without elements where it was not taken, of a Loop
    or Scan with the turns stacked along the first axis.
    ``permuted`` allows a tap to come in the runtime's own layout, which is cheaper; see :func:`_unreorder`. ``sizes``
    are Size nodes put into the graph and run as soon as they can, so that nothing is kept alive for them. ``profile``
    records what each node takes; see :meth:`profiled`. ``integers`` False computes Q/DQ models in float;
    ``arena`` False gives back what a run took when it ends.

    Large weights in a data file are read from that file in place (:func:`graphopt.references.referring`). Their kernels
    then do not repack them, which would copy every weight, unless the session is ``timed``. More of them than
    :data:`graphopt.pieces.PIECE` are read a piece of the model at a time, but where it is ``timed`` or profiled.

    Raises:
        RuntimeFailure: the model does not load; the message is the runtime's own, in one line.
    """

    def __init__(
        self,
        model: ir.Model | onnx.ModelProto | Loadable,
        *,
        optimize: bool = True,
        threads: int | None = None,
        taps: Sequence[str] = (),
        outputs: bool = True,
        permuted: bool = False,
        sizes: Sequence[onnx.NodeProto] = (),
        timed: bool = False,
        profile: bool = False,
        integers: bool = True,
        arena: bool = True,
    ) -> None:
        options = _session_options(optimize=optimize, threads=threads, sizes_first=bool(sizes))
        # Planned in time that grows with the square of the values alive: 8 s for a Concat of 20,000, which then runs in
        # 0.03 s. It changes no number, so that only a session that is timed has to have it as users do.
        options.enable_mem_pattern = timed or profile
        options.enable_cpu_mem_arena = arena
        given = model if isinstance(model, Loadable) else loadable(model, taps=taps, outputs=outputs, sizes=sizes)
        source, folder, self._scratch = given.source, given.folder, given.scratch
        if optimize and given.fatal is not None:
            raise RuntimeFailure(given.fatal)
        self._estimate, self._lifted = given.estimate, given.lifted
        if folder is not None:
            _read_in_place(options, folder, repack=timed)
        if not integers:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if profile:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="graphopt-")
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._scratch.name) / "profile")
            if isinstance(source, bytes) and folder is None:  # a larger one could not be written
                options.optimized_model_filepath = str(Path(self._scratch.name) / _OPTIMIZED)
        try:
            if permuted and optimize and folder is None and isinstance(source, bytes) and given.convolutions:
                self._session = _permuted_session(source, options)
            elif given.pieces is not None and folder is not None and not (timed or profile):
                whole = _session_options(optimize=False, threads=1, sizes_first=False)
                _read_in_place(whole, folder, repack=False)
                _inference_session(source, whole)  # whether it loads at all; no weight is read for that
                self._session = Pieces(given.pieces, lambda piece: _inference_session(piece, options))
            else:
                self._session = _inference_session(source, options)
        except Exception as error:  # pybind raises a family of its own without a common base
            raise _not_loaded(error) from error
        self.input_names = [i.name for i in self._session.get_inputs()]
        inner = {handed.name: name for name, handed in given.lifted.items()}
        self.output_names = [inner.get(o.name, o.name) for o in self._session.get_outputs()]

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> Outputs:
        """All outputs (and taps) by name.

        Raises:
            RuntimeFailure: the runtime refused these feeds.
        """
        wanted = list(names) if names is not None else self.output_names
        try:
            given = {k: v for k, v in feeds.items() if k in self.input_names}
            asked = [handed.name if (handed := self._lifted.get(name)) else name for name in wanted]
            values = watching.run(self._session, asked, given, self._estimate, _run_options)
        except OverBudget:
            raise
        except Exception as error:
            raise RuntimeFailure(f"ONNX Runtime cannot run the model: {one_line(error)}") from error
        found = dict(zip(wanted, values, strict=True))
        return found | {name: self._lifted[name].rows(found[name]) for name in wanted if name in self._lifted}

    def profiled(self) -> tuple[list[dict[str, Any]], onnx.GraphProto]:
        """What a session made with ``profile`` recorded (the runtime's events as it writes them), and the graph as
        the runtime optimized it (empty above 2 GB). It ends the recording."""
        import onnx

        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        assert self._scratch is not None
        path = Path(self._scratch.name) / _OPTIMIZED
        graph = onnx.load(path, load_external_data=False).graph if path.is_file() else onnx.GraphProto()
        self._scratch.cleanup()
        return events, graph


def _session_options(*, optimize: bool, threads: int | None, sizes_first: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # we report failures ourselves, in one line
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if sizes_first:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # A pool that spins between runs steals the core from whoever works on the outputs, or is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _read_in_place(options: Any, folder: Path, *, repack: bool) -> None:
    """Weights that the model refers to are read from files in ``folder``; ``repack``: into the kernels' own layout."""
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.add_session_config_entry("session.disable_prepacking", "0" if repack else "1")


def _run_options() -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    return options


def _inference_session(source: bytes | str, options: Any) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(source, sess_options=options, providers=["CPUExecutionProvider"])


def _permuted_session(source: bytes, options: Any) -> Any:
    """A session on the graph as the runtime optimized it, taps in whatever layout they have there."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        session = _inference_session(source, options)
        optimized = onnx.load(path)
    if not _unreorder(optimized.graph):
        return session
    options.optimized_model_filepath = ""
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimized already
    return _inference_session(optimized.SerializeToString(), options)


def _unreorder(graph: onnx.GraphProto) -> bool:
    """Let outputs come as the convolution wrote them; True where something changed.

    On the CPU, ONNX Runtime computes convolutions in a layout of its own: channels in blocks of 4, 8 or 16. Every tap
    between two of them costs a ReorderOutput, on efficientnet-lite0 0.3 times a whole inference. The blocked tensor
    holds the same elements per sample in another order, provided that the channels fill the last block.
    """
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return False  # bodies read values by name too
    outputs = {o.name: o for o in graph.output}
    swap: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "ReorderOutput" and node.output[0] in outputs:
            channels = next(a.i for a in node.attribute if a.name == "channels")
            if channels % 16 == 0 and node.input[0] not in swap:
                swap |= {node.input[0]: node.output[0], node.output[0]: node.input[0]}
                outputs[node.output[0]].ClearField("type")
    for node in graph.node:
        node.input[:] = [swap.get(n, n) for n in node.input]
        node.output[:] = [swap.get(n, n) for n in node.output]
    del graph.value_info[:]
    read = {n for node in graph.node for n in node.input} | set(outputs)
    kept = [n for n in graph.node if n.op_type != "ReorderOutput" or n.output[0] in read]
    del graph.node[:]
    graph.node.extend(kept)
    return bool(swap)


def ort_form(model: ir.Model, path: Path) -> Loadable:
    """Write the model in ONNX Runtime's own form, as ONNX Runtime Mobile reads it: optimized, but in no layout that
    only this machine's CPU has. Returns what a session is made of to run it from there.

    Raises:
        RuntimeFailure: the runtime cannot load it, or it holds what that form cannot.
    """
    return _write_fused(model, path, "ORT")


def fused_nodes(model: ir.Model) -> int:
    """Nodes the runtime is left with after the fusions it makes on every machine, those of bodies too.

    Raises:
        RuntimeFailure: the runtime cannot load it.
    """
    return sum(len(graph.node) for graph in _fused(model))


def fused_readers(model: ir.Model) -> Counter[str]:
    """How many nodes read each value after those fusions.

    Raises:
        RuntimeFailure: the runtime cannot load it.
    """
    return Counter(name for graph in _fused(model) for node in graph.node for name in {*node.input} if name)


def _fused(model: ir.Model) -> list[onnx.GraphProto]:
    import onnx

    with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
        path = Path(scratch) / _OPTIMIZED
        _write_fused(model, path, "ONNX")
        return list(graphs(onnx.load(path, load_external_data=False)))


def _write_fused(model: ir.Model, path: Path, form: str) -> Loadable:
    import onnxruntime as ort

    given = loadable(model)
    if given.fatal is not None:
        raise RuntimeFailure(given.fatal)
    options = _session_options(optimize=True, threads=1, sizes_first=False)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", form)
    if given.folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(given.folder))
    try:
        _inference_session(given.source, options)
    except Exception as error:  # pybind raises a family of its own
        raise _not_loaded(error) from error
    return Loadable(str(path), None, False, estimate=given.estimate)


def one_line(error: BaseException) -> str:
    """The runtime's message without its C++ coordinates."""
    text = " ".join(str(error).split())
    for mark in (" : FAIL : ", " : INVALID_ARGUMENT : ", " : INVALID_GRAPH : ", " : NOT_IMPLEMENTED : "):
        if mark in text:
            text = text.split(mark, 1)[1]
    return text[:300] or type(error).__name__
