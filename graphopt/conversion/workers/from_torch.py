"""PyTorch: exported programs (``.pt2``), ``module.py:function``, and TorchScript through the older exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job


def convert(job: Job) -> None:
    """Export with ``torch.onnx`` and run the module on inputs like its examples."""
    job.need("torch", "onnx", *(() if job.kind == "torchscript" else ("onnxscript",)))
    import torch

    job.framework = f"torch {torch.__version__}"
    torch.manual_seed(0)
    with torch.no_grad():
        if job.kind == "torchscript":
            module, examples = _script(job)
        elif job.kind == "pt2":
            module, examples = _program(job)
        else:
            module, examples = _function(job)
        _run(job, module, examples)


def _program(job: Job) -> tuple[Any, list[Any]]:
    import torch

    program = torch.export.load(str(job.source))
    if program.example_inputs is None:
        raise job.Refused(
            f"{job.source.name} has no example inputs in it, so it cannot be compared; export it again with "
            "torch.export.export(module, args)"
        )
    arguments, keywords = program.example_inputs
    exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=job.opset)
    exported.save(str(job.target))
    job.converter = "torch.onnx.export(dynamo=True)"
    flat = _flat([*arguments, *keywords.values()])
    module = program.module()
    tree = torch.utils._pytree.tree_structure((tuple(arguments), dict(keywords)))
    return lambda values: _call(module, *torch.utils._pytree.tree_unflatten(values, tree)), flat


def _function(job: Job) -> tuple[Any, list[Any]]:
    import torch

    returned = job.called()()
    arguments: tuple[Any, ...] | None = None
    keywords: dict[str, Any] = {}
    module = returned
    if isinstance(returned, tuple) and returned:
        module = returned[0]
        arguments = tuple(returned[1]) if len(returned) > 1 and isinstance(returned[1], (tuple, list)) else returned[1:]
        keywords = returned[2] if len(returned) > 2 and isinstance(returned[2], dict) else {}
    if not isinstance(module, torch.nn.Module):
        raise job.Refused(
            f"{job.source.name}:{job.function} returned a {type(module).__name__}; return a torch.nn.Module, or "
            "(module, example inputs)"
        )
    module.eval()
    if arguments is None or job.shapes:
        arguments, keywords = _asked(job, module), {}
    exported = torch.onnx.export(
        module,
        arguments,
        kwargs=keywords,
        dynamo=True,
        verbose=False,
        opset_version=job.opset,
        dynamic_shapes=_free(job) or None,
        input_names=[shape["name"] for shape in job.shapes if shape["name"]] or None,
    )
    exported.save(str(job.target))
    job.converter = "torch.onnx.export(dynamo=True)"
    flat = _flat([*arguments, *keywords.values()])
    tree = torch.utils._pytree.tree_structure((arguments, keywords))
    return lambda values: _call(module, *torch.utils._pytree.tree_unflatten(values, tree)), flat


def _asked(job: Job, module: Any) -> tuple[Any, ...]:
    """Example inputs of the shapes that ``--input-shape`` says; without a name they go in order."""
    import inspect

    import torch

    if not job.shapes:
        raise job.Refused(
            f"{job.source.name}:{job.function} returns a module alone, and exporting needs an input; give "
            "--input-shape x:1,3,224,224 (a name for a dim that is free: x:N,3,224,224), or return (module, inputs)"
        )
    order = list(inspect.signature(module.forward).parameters)
    named = [shape["name"] for shape in job.shapes if shape["name"]]
    unknown = [name for name in named if name not in order]
    if unknown:
        raise job.Refused(f"forward() has no input '{unknown[0]}'; it has {', '.join(order)}")
    if named and len(named) == len(job.shapes):
        job.shapes.sort(key=lambda shape: order.index(shape["name"]))
    values = [job.drawn(shape["dtype"], job.concrete(k)) for k, shape in enumerate(job.shapes)]
    return tuple(torch.from_numpy(value) for value in values)


def _free(job: Job) -> tuple[Any, ...]:
    """Dims that have a name, as torch.export wants to know them."""
    import torch

    known: dict[str, Any] = {}

    def dim(name: Any) -> Any:
        return known.setdefault(name, torch.export.Dim(name))

    found = tuple(
        {axis: dim(size) for axis, size in enumerate(shape["shape"]) if isinstance(size, str)} for shape in job.shapes
    )
    return found if known else ()


def _script(job: Job) -> tuple[Any, list[Any]]:
    import torch

    if not job.shapes:
        raise job.Refused("TorchScript does not say what it takes; give --input-shape x:1,3,224,224 for each input")
    module = torch.jit.load(str(job.source), map_location="cpu").eval()
    frozen = torch.jit.freeze(module)
    examples = [torch.from_numpy(job.drawn(s["dtype"], job.concrete(k))) for k, s in enumerate(job.shapes)]
    names = [shape["name"] or f"input_{k}" for k, shape in enumerate(job.shapes)]
    axes = {
        name: {axis: size for axis, size in enumerate(shape["shape"]) if isinstance(size, str)}
        for name, shape in zip(names, job.shapes, strict=True)
    }
    torch.onnx.export(
        frozen,
        tuple(examples),
        str(job.target),
        dynamo=False,
        opset_version=min(job.opset, 17),
        input_names=names,
        dynamic_axes={name: found for name, found in axes.items() if found},
    )
    job.converter = "torch.onnx.export(dynamo=False)"
    job.notes.append("TorchScript goes through PyTorch's older exporter, which is no longer developed")
    return lambda values: _call(module, values, {}), examples


def _flat(values: Any) -> list[Any]:
    import torch

    return list(torch.utils._pytree.tree_leaves(values))


def _call(module: Any, arguments: Any, keywords: Any) -> list[Any]:
    return [leaf.detach().cpu().numpy() for leaf in _flat(module(*arguments, **keywords)) if hasattr(leaf, "detach")]


def _run(job: Job, call: Any, examples: list[Any]) -> None:
    """The example itself, others like it, and one of another batch size where the model takes one."""
    import torch

    rounds: list[list[Any]] = [examples]
    given = job.data
    if given is not None:
        names = job.names()[0]
        missing = [name for name in names if name not in given]
        if missing:
            raise job.Refused(f"--data has no '{missing[0]}'; its keys must be the inputs: {', '.join(names)}")
        rows = len(given[names[0]])
        rounds = [[torch.from_numpy(given[name][k : k + 1]) for name in names] for k in range(min(rows, job.count))]
    else:
        for _ in range(job.count - 1):
            rounds.append([_like(job, value) for value in examples])
        if job.free_batch() and all(isinstance(v, torch.Tensor) and v.ndim for v in examples):
            rounds.append([torch.cat([value, _like(job, value)[:1]]) for value in rounds[-1]])
    for values in rounds:
        copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]  # a module may write into them
        outputs = call(copies)
        job.sample([v.detach().cpu().numpy() for v in values if isinstance(v, torch.Tensor)], outputs)


def _like(job: Job, value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(job.like(value.detach().cpu().numpy())).to(value.dtype)
