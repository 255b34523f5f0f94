"""What every front end's script shares. Run as ``python worker.py FRONT_END.py REQUEST.json`` in a fresh folder.

It needs numpy and onnx, which every converter brings; nothing of graphopt. The front end's ``convert(job)`` writes
``model.onnx`` and hands over inputs with the framework's own outputs; what became of it stands in ``answer.json``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL = "model.onnx"
SAMPLES = "samples.npz"
ANSWER = "answer.json"
_ANONYMOUS = re.compile(r"^(s\d+|unk__\d+|DynamicDimension\.\d+)$")
SEVERAL = 2
"""What a free dim is set to while exporting: with 1, exporters take it for a constant."""


class Refused(Exception):
    """What is wrong with the source or the request, in one line for the user."""


class Missing(Exception):
    """Packages that this interpreter has not."""

    def __init__(self, modules: list[str]) -> None:
        super().__init__(", ".join(modules))
        self.modules = modules


class Job:
    """One conversion: what was asked for, and what is to be answered."""

    Refused = Refused

    def __init__(self, request: dict[str, Any]) -> None:
        self.source = Path(request["source"])
        self.kind = str(request["kind"])
        self.function = request["function"]
        self.shapes: list[dict[str, Any]] = request["shapes"]
        self.opset: int = request["opset"]
        self.count: int = request["samples"]
        self.allow_code: bool = request["allow_code"]
        self.allow_pickle: bool = request["allow_pickle"]
        self.target = Path.cwd() / MODEL
        self.notes: list[str] = []
        self.framework = ""
        self.converter = ""
        self._samples: list[tuple[dict[str, Any], dict[str, Any]]] = []
        import numpy

        self.rng = numpy.random.default_rng(request["seed"])
        self.data = self._load(request["data"]) if request["data"] else None

    @staticmethod
    def _load(path: str) -> dict[str, Any]:
        import numpy

        try:
            with numpy.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:
            raise Refused(f"--data {path} cannot be read ({error}); save arrays with numpy.savez") from error

    def need(self, *modules: str) -> None:
        """Refuse before the import of a framework where a package is missing."""
        missing = [name for name in modules if importlib.util.find_spec(name.split(".")[0]) is None]
        if missing:
            raise Missing(missing)

    def called(self) -> Any:
        """What the user's ``file.py:function`` returns; its folder is importable, after the frameworks."""
        folder = str(self.source.resolve().parent)
        sys.path.insert(0, folder)
        spec = importlib.util.spec_from_file_location(self.source.stem, self.source)
        if spec is None or spec.loader is None:
            raise Refused(f"{self.source} is no Python file; give module.py:function")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found = getattr(module, str(self.function), None)
        if not callable(found):
            have = ", ".join(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
            raise Refused(f"{self.source.name} has no function '{self.function}' (it has {have or 'none'}); name one")
        return found

    def drawn(self, dtype: Any, shape: tuple[int, ...], *, high: int = 2) -> Any:
        """Seeded inputs: N(0, 1), integers from 0 to ``high`` (not included), booleans."""
        import numpy

        kind = numpy.dtype(dtype)
        if kind.kind in "iu":
            return numpy.asarray(self.rng.integers(0, high, shape)).astype(kind)
        if kind.kind == "b":
            return numpy.asarray(self.rng.integers(0, 2, shape)).astype(bool)
        return numpy.asarray(self.rng.standard_normal(shape)).astype(kind)

    def like(self, example: Any) -> Any:
        """Another input as legal as ``example``: floats drawn anew, anything else shuffled out of its own values."""
        import numpy

        array = numpy.asarray(example)
        if array.dtype.kind == "f":
            return self.drawn(array.dtype, array.shape)
        if array.size == 0:
            return array
        return numpy.asarray(self.rng.choice(array.reshape(-1), array.shape)).astype(array.dtype)

    def concrete(self, position: int, size: int = SEVERAL) -> tuple[int, ...]:
        """The shape asked for input number ``position``, with ``size`` for every free dim."""
        return tuple(dim if isinstance(dim, int) else size for dim in self.shapes[position]["shape"])

    def names(self) -> tuple[list[str], list[str]]:
        """Inputs and outputs of the model that was written, in order."""
        import onnx

        if not self.target.is_file():
            raise Refused(f"{self.converter} said that it was done and wrote nothing; run again with -v")
        try:
            graph = onnx.load(str(self.target), load_external_data=False).graph
        except Exception as error:
            raise Refused(f"{self.converter} wrote an invalid model ({error}); report it to the converter") from error
        held = {tensor.name for tensor in graph.initializer}
        return [i.name for i in graph.input if i.name not in held], [o.name for o in graph.output]

    def free_batch(self) -> bool:
        """Whether the leading dim of every input of the written model is free, and is the same."""
        import onnx

        graph = onnx.load(str(self.target), load_external_data=False).graph
        held = {tensor.name for tensor in graph.initializer}
        dims = [i.type.tensor_type.shape.dim for i in graph.input if i.name not in held]
        return bool(dims) and all(d and not d[0].HasField("dim_value") for d in dims)

    def rename(self, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> None:
        """Give the written model's inputs, or outputs, these names, where they are as many, different, not in use."""
        import onnx

        model = onnx.load(str(self.target), load_external_data=False)
        graph = model.graph
        used = {n for node in graph.node for n in (*node.input, *node.output)} | {i.name for i in graph.input}
        names: dict[str, str] = {}
        for wanted, values in ((inputs, graph.input), (outputs, graph.output)):
            if len(wanted) == len(values) == len(set(wanted) - used):
                names |= {value.name: name for value, name in zip(values, wanted, strict=True)}
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.name = names.get(value.name, value.name)
        for node in graph.node:
            node.input[:] = [names.get(n, n) for n in node.input]
            node.output[:] = [names.get(n, n) for n in node.output]
        if any(attribute.type == onnx.AttributeProto.GRAPH for node in graph.node for attribute in node.attribute):
            return  # bodies read values by name too
        self.target.write_bytes(model.SerializeToString())

    def sample(self, inputs: list[Any], outputs: list[Any]) -> None:
        """Inputs, in the order of the model's, and what the framework made of them."""
        import numpy

        names = self.names()
        for side, values, found in (("inputs", inputs, names[0]), ("outputs", outputs, names[1])):
            if len(values) != len(found):
                raise Refused(
                    f"the framework has {len(values)} {side} and the converted model {len(found)} "
                    f"({', '.join(found)}); the converter dropped or added some: simplify the source"
                )
        pair = tuple(
            {name: numpy.asarray(value) for name, value in zip(found, values, strict=True)}
            for found, values in ((names[0], inputs), (names[1], outputs))
        )
        self._samples.append(pair)  # type: ignore[arg-type]

    def name_dims(self, axes: dict[int, str]) -> None:
        """Call free dims by what they are, instead of the exporter's own ``s77`` and ``unk__22``: those that stand at
        these axes of every input. An output's is renamed with them where it was as large in every sample."""
        import onnx

        inputs, outputs = self.names()
        model = onnx.load(str(self.target), load_external_data=False)
        for axis, name in axes.items():
            sizes = [{values[n].shape[axis] for n in inputs if values[n].ndim > axis} for values, _ in self._samples]
            if not sizes or any(len(found) != 1 for found in sizes) or len(set.union(*sizes)) < 2:
                continue  # not the same everywhere, or never seen in two sizes
            every = [found.pop() for found in sizes]
            for value in (*model.graph.input, *model.graph.output):
                dims = value.type.tensor_type.shape.dim
                if (
                    value.name not in (*inputs, *outputs)
                    or len(dims) <= axis
                    or not _ANONYMOUS.match(dims[axis].dim_param)
                ):
                    continue
                side = 0 if value.name in inputs else 1
                if [pair[side][value.name].shape[axis] for pair in self._samples] == every:
                    dims[axis].dim_param = name
        del model.graph.value_info[:]  # it may use the old names
        self.target.write_bytes(model.SerializeToString())

    def answer(self) -> dict[str, Any]:
        """Write the samples; the answer that says so."""
        import numpy

        self.name_dims({0: "batch"})
        arrays: dict[str, Any] = {}
        for index, (inputs, outputs) in enumerate(self._samples):
            for side, values in (("in", inputs), ("out", outputs)):
                for name, value in values.items():
                    arrays[f"{index}/{side}/{name}"] = value.astype(str) if value.dtype == object else value
        numpy.savez(SAMPLES, **arrays)
        return {
            "ok": True,
            "samples": len(self._samples),
            "framework": self.framework,
            "converter": self.converter,
            "notes": self.notes,
        }


def _one_line(error: BaseException) -> str:
    """The innermost cause on one line: exporters wrap it in pages of advice."""
    seen = error
    while seen.__cause__ is not None:
        seen = seen.__cause__
    lines = [" ".join(line.split()) for line in str(seen).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return (f"{type(seen).__name__}: {text}" if text else type(seen).__name__)[:300]


def main() -> None:
    """Do what ``REQUEST.json`` says with ``FRONT_END.py``, and answer."""
    warnings.simplefilter("ignore")
    script, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer: dict[str, Any]
    try:
        spec = importlib.util.spec_from_file_location(script.stem, script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if importlib.util.find_spec("numpy") is None:
            raise Missing(["numpy"])
        job = Job(request)
        module.convert(job)
        answer = job.answer()
    except Missing as error:
        answer = {"ok": False, "why": "missing", "message": str(error), "modules": error.modules}
    except ModuleNotFoundError as error:  # something that a framework imports late
        answer = {"ok": False, "why": "missing", "message": str(error), "modules": [str(error.name)]}
    except Refused as error:
        answer = {"ok": False, "why": "refused", "message": str(error)}
    except MemoryError:
        answer = {"ok": False, "why": "failed", "message": "out of memory"}
    except (Exception, SystemExit) as error:
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        answer = {"ok": False, "why": "failed", "message": _one_line(error), "trace": trace}
    part = Path(ANSWER + ".part")
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.replace(ANSWER)


if __name__ == "__main__":
    main()
