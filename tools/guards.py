"""The guards of tools/guard_mutation.py: where each stands, what takes it away, and which tests have to notice."""

from __future__ import annotations

from dataclasses import dataclass

EXTERNAL = ("tests/test_external.py", "tests/hostile", "-k", "external")
KINDS = ("tests/hostile", "-k")
STORAGE = ("tests/test_storage.py",)


@dataclass(frozen=True)
class Guard:
    """``before`` stands once in ``file``; with ``after`` in its place the guard is gone, and ``tests`` must fail.

    ``seconds``: after which they count as hanging, which is what the guard is against.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    seconds: float = 1200


def gate(name: str, before: str, after: str) -> Guard:
    return Guard(f"external: {name}", "graphopt/external.py", before, after, EXTERNAL)


def kinds(name: str, file: str, before: str, after: str, which: str) -> Guard:
    return Guard(name, f"graphopt/{file}.py", before, after, (*KINDS, which))


def saving(name: str, before: str, after: str) -> Guard:
    return Guard(f"saving: {name}", "graphopt/storage.py", before, after, STORAGE)


GUARDS = (
    gate("path inside the folder", "if self._inside(path, bases):", "if True:"),
    gate("place of what was opened", "if not self._inside(real, self._bases()):", "if False:"),
    gate("regular file", "if not stat.S_ISREG(status.st_mode):", "if False:"),
    gate("hard links", "if status.st_nlink > 1 and", "if False and"),
    gate("links not followed", 'getattr(os, "O_NOFOLLOW", 0)', "0"),
    Guard(
        "external: no waiting for a pipe",
        "graphopt/external.py",
        'getattr(os, "O_NONBLOCK", 0)',
        "0",
        ("tests/test_external.py", "-k", "fifo"),
        120,
    ),
    gate("keys twice", "if entry.key in entries:", "if False:"),
    gate("length and shape", "if length != needed:", "if False:"),
    gate("end of the file", "if offset + length > size:", "if False:"),
    gate("byte counts", "text.isascii() and text.isdigit() and len(text) < 20", "text.isdigit()"),
    gate("NUL in a location", 'or not location or "\\0" in location', "or not location"),
    gate("negative dims", "if dim < 0:", "if False:"),
    gate("sparse and training tensors are bounded", "if length > _INLINE_LIMIT:", "if False:"),
    gate("other files where nothing was named", "if not bases:", "if False:"),
    kinds("tensor: impossible shapes", "inline", "if len(tensor.dims) > MAX_RANK or", "if False and", "tensor"),
    kinds("tensor: bytes and shape", "inline", "if needed != given:", "if False:", "tensor or sparse"),
    kinds("tensor: numbers and shape", "inline", "if given != needed or", "if False and", "tensor"),
    kinds("graph: no opset", "structure", "if not proto.opset_import and", "if False and", "opset"),
    kinds("graph: no output", "structure", "if not proto.graph.output:", "if False:", "graph"),
    kinds(
        "graph: cycles", "structure", "left = set(range(len(nodes))).difference(order)", "left = set[int]()", "cycle"
    ),
    kinds(
        "graph: nesting",
        "structure",
        '    if depth > MAX_NESTING:\n        return f"subgraphs are nested more than '
        '{MAX_NESTING} deep"\n    inputs =',
        "    inputs =",
        "nested",
    ),
    kinds("graph: recursion", "structure", "return _recursion(calls)", "return None", "function"),
    kinds("operators: inputs and outputs", "schemas", "if not least <= count <= most:", "if False:", "graph"),
    kinds("operators: inputs left out", "schemas", "if missing is not None:", "if False:", "graph"),
    kinds("operators: attributes needed", "schemas", "if absent is not None:", "if False:", "graph"),
    kinds("operators: attributes twice", "schemas", "if len(given) < len(node.attribute):", "if False:", "attribute"),
    kinds("operators: types of attributes", "schemas", "if kind is not None and", "if False and", "attribute"),
    kinds(
        "operators: empty attributes",
        "schemas",
        "if name is not None and (undefined",
        "if False and (undefined",
        "attribute or constant",
    ),
    kinds("operators: ranks", "schemas", "if rank > MAX_RANK else None", "if False else None", "type"),
    kinds("functions: nodes they become", "expansion", "if made > room:", "if False:", "tower"),
    kinds("functions: depth of calls", "expansion", "if deepest > allowed.calls:", "if False:", "function"),
    Guard(
        "lists inference writes out",
        "graphopt/propagation.py",
        "if any(_long(graph) for",
        "if any(False for",
        ("tests/test_budgets.py", "-k", "long_list"),
        120,
    ),
    kinds("lists joined with themselves", "expansion", "if size > limit:", "if False:", "doubling"),
    kinds("cost: trips of loops", "costing", "if loops.steps > allowed.steps:", "if False:", "loop"),
    kinds("cost: bytes of values", "costing", "if size > room:", "if False:", "bomb"),
    kinds("cost: what loops collect", "costing", "trips.get(id(body), 1) * sum", "0 * sum", "collects"),
    kinds("watch: time", "watching", "options.terminate = True", "pass", "without_end or without-end"),
    Guard(
        "watch: memory",
        "graphopt/watching.py",
        "resource.setrlimit(resource.RLIMIT_DATA, (cap, old[1]))",
        "pass",
        ("tests/test_budgets.py", "-k", "capped"),
    ),
    Guard(
        "watch: a pass does not swallow it",
        "graphopt/manager.py",
        "except OverBudget:\n            raise",
        "except ZeroDivisionError:\n            raise",
        ("tests/test_budgets.py",),
    ),
    Guard(
        "onnxsim is not given bombs",
        "passes/simplify.py",
        "check_runnable(model, original)",
        "pass",
        ("tests/test_budgets.py",),
    ),
    Guard(
        "telemetry",
        "graphopt/session.py",
        'os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")',
        "pass",
        ("tests/test_budgets.py",),
    ),
    kinds("files: pipes and devices", "opened", "if not (stat.S_ISREG(mode) or", "if not (True or", "fifo or device"),
    Guard("files: no waiting", "graphopt/opened.py", 'getattr(os, "O_NONBLOCK", 0)', "0", (*KINDS, "bytes-fifo"), 120),
    kinds("files: size", "opened", "if status.st_size > limit:", "if False:", "sparse-file"),
    kinds("data: objects", "data/stored", "if dtype.hasobject:", "if False:", "data"),
    kinds("data: records", "data/stored", "if dtype.fields is not None:", "if False:", "data"),
    kinds("data: headers that lie", "data/stored", "if claimed > available - skip:", "if False:", "data"),
    kinds("data: negative shapes", "data/stored", "if any(dim < 0 for dim in shape):", "if False:", "data"),
    Guard(
        "data: long headers",
        "graphopt/data/stored.py",
        "if count > _MAX_HEADER:",
        "if False:",
        ("tests/test_data.py", "-k", "hostile_array"),
    ),
    kinds("data: bombs", "data/stored", "if info.file_size > _BOMB and", "if False and", "zip"),
    kinds(
        "data: pipes and devices",
        "data/stored",
        "if not stat.S_ISREG(path.stat().st_mode):",
        "if False:",
        "data-fifo or data-device",
    ),
    saving("a new file, renamed", "temporary.replace(target)", "target.write_bytes(temporary.read_bytes())"),
    saving(
        "on disk before the rename",
        "os.fsync(stream.fileno())\n        stream.close()\n        temporary.replace(target)",
        "stream.close()\n        temporary.replace(target)",
    ),
    saving("nothing left lying about", "temporary.unlink(missing_ok=True)", "pass"),
    saving("data of a failed save", "if data is not None and not existed:", "if False:"),
    saving("only our own data files are removed", "if ours.fullmatch(name)", "if True"),
    saving("links stay links", "target = Path(os.path.realpath(place(path)))", "target = Path(place(path)).absolute()"),
)
