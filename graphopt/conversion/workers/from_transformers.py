"""A folder that ``save_pretrained`` of transformers wrote: ``config.json`` and safetensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job

_LENGTH = 12
_TAKES = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "input_values", "input_features")
"""What is fed where the model takes it. Decoders get no cache: one pass over the whole text."""
_IMAGES = ("pixel_values",)


def convert(job: Job) -> None:
    """Load with safetensors only and no code of the folder's, export with ``torch.onnx``."""
    job.need("torch", "transformers", "onnxscript")
    import torch
    import transformers

    job.framework = f"transformers {transformers.__version__}, torch {torch.__version__}"
    job.converter = "torch.onnx.export(dynamo=True)"
    transformers.logging.set_verbosity_error()
    settings = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    if settings.get("auto_map"):
        raise job.Refused(
            f"{job.source.name} brings Python code of its own (auto_map in config.json), which is not run; write a "
            "function that loads the model, and convert module.py:function"
        )
    kind = _kind(job, transformers, settings)
    model = kind.from_pretrained(
        str(job.source),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        attn_implementation="eager",
    )
    model = model.eval().float()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    inputs = _inputs(job, model, rows=2, length=_LENGTH)
    if not inputs:
        raise job.Refused(f"{kind.__name__} takes none of {', '.join(_TAKES)}; convert it by module.py:function")
    wrapped = _Flat(model, list(inputs)).eval()
    with torch.no_grad():
        names = wrapped.names(inputs)
        free = {name: _free(torch, name, value) for name, value in inputs.items()}
        exported = torch.onnx.export(
            wrapped.module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=job.opset,
            input_names=list(inputs),
            output_names=names,
            dynamic_shapes=(tuple(free.values()),),
        )
        exported.save(str(job.target))
        taken = job.names()[0]
        for rows, length in ((1, _LENGTH), (2, _LENGTH), (3, 7), (1, 20))[: max(job.count, 2)]:
            sample = _inputs(job, model, rows=rows, length=length)
            made = [value.numpy() for value in wrapped.module(*sample.values())]
            job.sample([sample[name].numpy() for name in taken], made)
    if "pixel_values" not in inputs:
        job.name_dims({1: "length"})
    if "attention_mask" in inputs:
        job.notes.append("masks were compared as all ones and with the end masked out")


class _Flat:
    """A module that takes the inputs by position and gives the tensors of the output, in order."""

    def __init__(self, model: Any, names: list[str]) -> None:
        import torch

        class Module(torch.nn.Module):  # type: ignore[misc]  # torch is not there where types are checked
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *values: Any) -> Any:
                made = self.model(**dict(zip(names, values, strict=True)))
                return tuple(value for value in made.to_tuple() if isinstance(value, torch.Tensor))

        self.module = Module()
        self.model = model

    def eval(self) -> _Flat:
        self.module.eval()
        return self

    def names(self, inputs: dict[str, Any]) -> list[str]:
        import torch

        made = self.model(**inputs)
        return [name for name, value in made.items() if isinstance(value, torch.Tensor)]


def _kind(job: Job, transformers: Any, settings: dict[str, Any]) -> Any:
    """The class that the config names, of transformers' own."""
    names = settings.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise job.Refused(f"{job.source.name} is a {names[0]}, which transformers {transformers.__version__} has not")
    return kind


def _inputs(job: Job, model: Any, *, rows: int, length: int) -> dict[str, Any]:
    """Legal inputs by the config: ids below the vocabulary's size, masks, images of the model's own size."""
    import inspect

    import torch

    config = model.config
    taken = [name for name in _TAKES if name in inspect.signature(model.forward).parameters]
    found: dict[str, Any] = {}
    for name in taken:
        if name == "input_ids":
            high = int(getattr(config, "vocab_size", 100))
            found[name] = torch.from_numpy(job.drawn("int64", (rows, length), high=high))
        elif name == "attention_mask" and "input_ids" in found:
            mask = torch.ones((rows, length), dtype=torch.int64)
            mask[-1, length - 3 :] = 0 if rows > 1 else 1
            found[name] = mask
        elif name == "token_type_ids" and int(getattr(config, "type_vocab_size", 0) or 0) > 0:
            found[name] = torch.from_numpy(job.drawn("int64", (rows, length), high=int(config.type_vocab_size)))
        elif name in _IMAGES and not found:
            size = getattr(config, "image_size", 224)
            size = size if isinstance(size, (list, tuple)) else (size, size)
            found[name] = torch.from_numpy(
                job.drawn("float32", (rows, int(getattr(config, "num_channels", 3)), int(size[0]), int(size[1])))
            )
        elif name in ("input_values", "input_features") and not found:
            raise job.Refused(
                f"{job.source.name} takes sound, of which the config does not say how much; convert it by "
                "module.py:function, which returns (module, example inputs)"
            )
    return found


def _free(torch: Any, name: str, value: Any) -> dict[int, Any]:
    """The batch, and the length of texts."""
    batch = {0: torch.export.Dim.DYNAMIC}
    return batch if name in _IMAGES else {**batch, 1: torch.export.Dim.DYNAMIC}
