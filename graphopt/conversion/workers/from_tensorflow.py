"""TensorFlow through tf2onnx: SavedModel, frozen graph, ``.keras``, ``.tflite``."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job

_NEWEST = 18
"""tf2onnx knows no later opset."""
_UNSAFE = frozenset({"PyFunc", "PyFuncStateless", "EagerPyFunc", "ReadFile", "WriteFile"})
"""Operators that run Python, or read and write whatever file they name, when the graph runs."""


def convert(job: Job) -> None:
    """Export, and run the framework's own interpreter on the same inputs."""
    job.need("tensorflow", "tf2onnx")
    import tensorflow
    import tf2onnx

    job.framework = f"tensorflow {tensorflow.__version__}"
    job.converter = f"tf2onnx {tf2onnx.__version__}"
    {"savedmodel": _saved_model, "graphdef": _frozen, "keras": _keras, "tflite": _tflite}[job.kind](job)


def _opset(job: Job) -> int:
    return min(job.opset, _NEWEST)


def _rounds(job: Job, specs: list[tuple[str, Any, Any]]) -> list[list[Any]]:
    """Inputs for (name, dtype, shape) of each; a free dim is 1, at the end 3 where it leads."""
    if job.data is not None:
        names = [name for name, _, _ in specs]
        keys = names if all(name in job.data for name in names) else list(job.data)
        if len(keys) != len(names):
            raise job.Refused(f"--data has {', '.join(keys)}; the model takes {', '.join(names)}")
        rows = min(job.count, len(job.data[keys[0]]))
        return [
            [job.data[key][k : k + 1].astype(d) for key, (_, d, _) in zip(keys, specs, strict=True)]
            for k in range(rows)
        ]
    shapes = [_shape(job, name, k, shape) for k, (name, _, shape) in enumerate(specs)]
    found = []
    for batch in (*[1] * (job.count - 1), 3):
        made = [tuple((batch if a == 0 else 1) if d is None else d for a, d in enumerate(shape)) for shape in shapes]
        found.append([job.drawn(dtype, shape, high=8) for (_, dtype, _), shape in zip(specs, made, strict=True)])
    return found


def _shape(job: Job, name: str, position: int, shape: Any) -> list[int | None]:
    """What the model declares, or what ``--input-shape`` says instead."""
    for k, asked in enumerate(job.shapes):
        if asked["name"] == name or (not asked["name"] and k == position):
            return [dim if isinstance(dim, int) else None for dim in asked["shape"]]
    if shape is None:
        raise job.Refused(f"input '{name}' has no declared shape; give --input-shape {name}:1,224,224,3")
    dims = [None if dim is None or int(dim) < 0 else int(dim) for dim in shape]
    if any(dim is None for dim in dims[1:]):
        raise job.Refused(
            f"input '{name}' has free dims beside the first ({dims}); give their sizes: --input-shape {name}:N,9,9,3"
        )
    return dims


def _specs(tensors: Any) -> list[tuple[str, Any, Any]]:
    return [
        (t.name.split(":")[0], t.dtype.as_numpy_dtype, None if t.shape.rank is None else t.shape.as_list())
        for t in tensors
    ]


def _listed(made: Any) -> list[Any]:
    import tensorflow as tf

    return [value.numpy() for value in tf.nest.flatten(made)]


def _keras(job: Job) -> None:
    import tensorflow as tf
    import tf2onnx

    _no_code(job)
    model = tf.keras.models.load_model(str(job.source), compile=False, safe_mode=not job.allow_code)
    specs = _specs([tf.TensorSpec(t.shape, t.dtype, t.name) for t in model.inputs])
    signature = [tf.TensorSpec(_declared(job, k, spec), spec[1], name=spec[0]) for k, spec in enumerate(specs)]
    single = len(signature) == 1

    def run(*values: Any) -> Any:
        return tf.nest.flatten(model(values[0] if single else list(values), training=False))

    function = tf.function(run, input_signature=signature)
    tf2onnx.convert.from_function(function, signature, opset=_opset(job), output_path=str(job.target))
    job.rename(outputs=list(getattr(model, "output_names", [])))
    for values in _rounds(job, specs):
        job.sample(values, _listed(function(*map(tf.constant, values))))


def _no_code(job: Job) -> None:
    """Keras' own safe mode looks while it loads; the config is looked at before."""
    if job.allow_code:
        return
    with zipfile.ZipFile(job.source) as archive:
        config = json.loads(archive.read("config.json"))
    stack: list[Any] = [config]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            module = str(item.get("module") or "keras").split(".")[0]
            if item.get("class_name") in ("Lambda", "__lambda__") or module not in ("keras", "builtins", "numpy"):
                raise job.Refused(
                    f"{job.source.name} holds code of its own ({item.get('module')}.{item.get('class_name')}); if you "
                    "trust where it comes from, give --allow-code"
                )
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _declared(job: Job, position: int, spec: tuple[str, Any, Any]) -> list[int | None]:
    """The signature to export: what the model says, or what was asked for; a free leading dim stays free."""
    return _shape(job, spec[0], position, spec[2])


def _saved_model(job: Job) -> None:
    _known_operators(job)
    import tensorflow as tf
    from tf2onnx import tf_loader

    try:
        loaded = tf.saved_model.load(str(job.source))
    except AttributeError:  # an optimizer of Keras 2 in it, which Keras 3 has not
        _old_saved_model(job)
        return
    signatures = getattr(loaded, "signatures", {})
    if not signatures:
        raise job.Refused(
            f"{job.source.name} has no signature, so nothing says what it takes; save it again with "
            "tf.saved_model.save(model, folder, signatures=...)"
        )
    name = "serving_default" if "serving_default" in signatures else next(iter(signatures))
    others = sorted(set(signatures) - {name, "serve"})
    if others:
        job.notes.append(f"the signature '{name}' is converted, and not {', '.join(others)}")
    function = signatures[name]
    graph, inputs, outputs, renamed = tf_loader.from_saved_model(
        str(job.source), None, None, tag=["serve"], signatures=[name], return_tensors_to_rename=True
    )
    _export(job, graph, inputs, outputs, renamed)
    takes = function.structured_input_signature[1]
    order = job.names()  # the names are the signature's own now
    specs = [(key, takes[key].dtype.as_numpy_dtype, _dims(takes[key])) for key in order[0]]
    for values in _rounds(job, specs):
        made = function(**{key: tf.constant(value) for key, value in zip(order[0], values, strict=True)})
        job.sample(values, [made[key].numpy() for key in order[1]])


def _old_saved_model(job: Job) -> None:
    """Through TensorFlow 1's loader, which restores the graph and its variables and no Python objects."""
    import tensorflow as tf
    from tf2onnx import tf_loader

    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph, v1.Session() as session:
        signatures = v1.saved_model.load(session, ["serve"], str(job.source)).signature_def
        signature = signatures["serving_default" if "serving_default" in signatures else next(iter(signatures))]
        # Protobuf's maps come in another order in each process; Keras sorts by name, too.
        inputs = {tensor.name: key for key, tensor in sorted(signature.inputs.items())}
        outputs = {tensor.name: key for key, tensor in sorted(signature.outputs.items())}
        operators = sorted({name.split(":")[0] for name in outputs})
        frozen = v1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), operators)
        frozen = tf_loader.tf_optimize(list(inputs), list(outputs), frozen)
        _export(job, frozen, list(inputs), list(outputs), {**inputs, **outputs})
        order = job.names()
        by_key = {key: graph.get_tensor_by_name(name) for name, key in (*inputs.items(), *outputs.items())}
        specs = [(key, by_key[key].dtype.as_numpy_dtype, _dims(by_key[key])) for key in order[0]]
        for values in _rounds(job, specs):
            feeds = {by_key[key]: value for key, value in zip(order[0], values, strict=True)}
            job.sample(values, session.run([by_key[key] for key in order[1]], feeds))
    job.notes.append("loaded by TensorFlow 1's loader: its objects are Keras 2's")


def _dims(tensor: Any) -> Any:
    return None if tensor.shape.rank is None else tensor.shape.as_list()


def _export(job: Job, graph: Any, inputs: list[str], outputs: list[str], renamed: dict[str, str]) -> None:
    import tf2onnx

    tf2onnx.convert._convert_common(
        graph,
        name="model",
        input_names=inputs,
        output_names=outputs,
        tensors_to_rename=renamed,
        opset=_opset(job),
        output_path=str(job.target),
    )


def _known_operators(job: Job) -> None:
    """Refuse operators that are none of TensorFlow's, and those that run Python or touch files, before it is loaded."""
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow.python.framework import op_def_registry

    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString((job.source / "saved_model.pb").read_bytes())
    except Exception as error:
        raise job.Refused(f"{job.source.name}/saved_model.pb is damaged; export it again") from error
    custom: set[str] = set()
    unsafe: set[str] = set()
    for meta in proto.meta_graphs:
        functions = {f.signature.name for f in meta.graph_def.library.function}
        nodes = list(meta.graph_def.node)
        for f in meta.graph_def.library.function:
            nodes += list(f.node_def)
        for node in nodes:
            if node.op in _UNSAFE:
                unsafe.add(node.op)
            elif node.op not in functions and op_def_registry.get(node.op) is None:
                custom.add(node.op)
    if custom:
        raise job.Refused(
            f"{job.source.name} uses operators that are not TensorFlow's ({', '.join(sorted(custom)[:3])}); nothing "
            "was loaded: export the model without them"
        )
    if unsafe and not job.allow_code:
        raise job.Refused(
            f"{job.source.name} runs Python or reads files ({', '.join(sorted(unsafe)[:3])}); nothing was loaded: "
            "export the model without them, or give --allow-code if you trust where it comes from"
        )


def _frozen(job: Job) -> None:
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(job.source.read_bytes())
    read = {name.split(":")[0].lstrip("^") for node in graph.node for name in node.input}
    inputs = [f"{node.name}:0" for node in graph.node if node.op == "Placeholder"]
    outputs = [f"{n.name}:0" for n in graph.node if n.name not in read and n.op not in ("NoOp", "Const", "Placeholder")]
    if not inputs or not outputs:
        raise job.Refused(f"{job.source.name} has no placeholder or no output; is it a frozen graph?")

    def imported() -> None:
        tf.compat.v1.import_graph_def(graph, name="")

    wrapped = tf.compat.v1.wrap_function(imported, [])
    pruned = wrapped.prune([wrapped.graph.get_tensor_by_name(n) for n in inputs], [
        wrapped.graph.get_tensor_by_name(n) for n in outputs
    ])  # fmt: skip
    _export(job, graph, inputs, outputs, {name: name.split(":")[0] for name in (*inputs, *outputs)})
    for values in _rounds(job, _specs(pruned.inputs)):
        job.sample(values, _listed(pruned(*map(tf.constant, values))))


def _tflite(job: Job) -> None:
    import numpy
    import tensorflow as tf
    import tf2onnx

    try:
        interpreter = tf.lite.Interpreter(model_path=str(job.source))
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise job.Refused(f"TensorFlow Lite cannot load {job.source.name}: {line}; is it whole?") from error
    taken, given = interpreter.get_input_details(), interpreter.get_output_details()
    tf2onnx.convert._convert_common(
        None, tflite_path=str(job.source), opset=_opset(job), output_path=str(job.target), name=job.source.stem
    )
    names = job.names()
    by_name = [{d["name"]: d for d in details} for details in (taken, given)]
    takes = [by_name[0].get(name, taken[k]) for k, name in enumerate(names[0])]
    gives = [by_name[1].get(name, given[k]) for k, name in enumerate(names[1])]
    specs = [(d["name"], d["dtype"], [int(size) for size in d["shape"]]) for d in takes]
    if any(d["quantization_parameters"]["scales"].size for d in takes + gives):
        job.notes.append("integers in and out: an output may be a step away where the framework rounds differently")
    rounds = _rounds(job, specs)
    if job.data is None and job.free_batch():
        rounds.append([job.drawn(v.dtype, (3, *v.shape[1:]), high=8) for v in rounds[-1]])
    for values in rounds:
        values = [_bytes(job, v, d) for v, d in zip(values, takes, strict=True)]
        try:
            for detail, value in zip(takes, values, strict=True):
                interpreter.resize_tensor_input(detail["index"], value.shape)
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError):
            break  # it runs at its own size only
        for detail, value in zip(takes, values, strict=True):
            interpreter.set_tensor(detail["index"], value)
        interpreter.invoke()
        job.sample(values, [numpy.array(interpreter.get_tensor(d["index"])) for d in gives])


def _bytes(job: Job, value: Any, detail: dict[str, Any]) -> Any:
    """8-bit inputs over their whole range: small integers alone would say little."""
    import numpy

    kind = numpy.dtype(detail["dtype"])
    if kind.itemsize == 1 and kind.kind in "iu" and job.data is None:
        limits = numpy.iinfo(kind)
        return job.rng.integers(limits.min, limits.max, value.shape, endpoint=True).astype(kind)
    return value
