"""Store weights in fewer bits; the arithmetic stays in float."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Change, Context, Contract, Pass, PassResult, Skip
from graphopt.errors import PreconditionError, did_you_mean
from graphopt.gram import Seen
from graphopt.graph import attribute, opset, static_shape, value_names
from graphopt.linear import Form, form_of
from graphopt.passes._block_rounding import fits, importance, rounded_for_outputs
from graphopt.passes._copies import shield
from graphopt.passes._decodable import undecodable
from graphopt.passes._decode import Decoder
from graphopt.passes._encode import Encoded, Encoder, Unfit
from graphopt.passes._formats import FORMATS, Format
from graphopt.passes._layout import Layout, fitting_block
from graphopt.passes._patterns import check_patterns
from graphopt.passes._rewire import OFF
from graphopt.passes._weight_uses import Weight, find_weights, rows_of
from graphopt.spill import Spill

ROUNDINGS = ("auto", "nearest", "fitted", "data")
KERNELS = ("standard", "ort")
BLOCKS = (16, 32, 64, 128, 256)
_OVERHEAD = 400
"""Bytes that the nodes which decode one weight take in the file, about."""

_LEAST_HALF = 2.0**-14
"""Scales below are no normal float16: they are then stored as float32."""


@dataclass(frozen=True)
class CompressWeights(Pass):
    """MatMul, Gemm, Conv, ConvTranspose, recurrent and looked-up weights are stored as ``format`` says and decoded in
    the graph; products, sums and activations stay in float.

    ``block``: elements that share a scale, of the formats in blocks. ``round_to``: ``nearest``; ``fitted``, which
    clips a block's largest weights where that leaves less error; ``data``, to what each layer's output asks for
    (needs calibration data); ``auto``: ``data`` where there is some, else ``fitted``. ``exclude`` and ``include``: node
    names, globs, ``re:`` expressions or operator types. ``assign``: ``WEIGHT=FORMAT`` for single weights; ``float``
    is a format, too: as it is. ``kernel``: 4-bit products as ``standard`` operators, or as ``ort``'s own MatMulNBits,
    which loads faster and which no other runtime reads.
    """

    format: str = "int8"
    block: int = 64
    round_to: str = "auto"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    assign: tuple[str, ...] = ()
    kernel: str = "standard"
    name: ClassVar[str] = "compress-weights"
    contract: ClassVar[Contract] = "approximate"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("format", self.format, (*FORMATS, "float")),
            ("round-to", self.round_to, ROUNDINGS),
            ("kernel", self.kernel, KERNELS),
        ):
            if value not in known:
                hint = did_you_mean(str(value), known, f"one of {', '.join(known)}")
                raise ValueError(f"{option} is '{value}'; {hint}")
        if self.block not in BLOCKS:
            raise ValueError(f"block is {self.block}; one of {', '.join(map(str, BLOCKS))}")
        for item in self.assign:
            weight, _, form = item.rpartition("=")
            if not weight or (form not in FORMATS and form != "float"):
                raise ValueError(f"assign '{item}' is no WEIGHT=FORMAT; formats: float, {', '.join(FORMATS)}")

    @property
    def formats(self) -> dict[str, str]:
        """What ``assign`` says: weight -> format."""
        return dict(item.rpartition("=")[::2] for item in self.assign)

    @property
    def least_opset(self) -> int:
        """The first operator set that has what decodes these formats."""
        return max((FORMATS[form].opset for form in self._used), default=1)

    @property
    def _used(self) -> list[str]:
        return [form for form in dict.fromkeys((self.format, *self.formats.values())) if form != "float"]

    def check(self, model: ir.Model) -> None:
        now = opset(model)
        if now < self.least_opset:
            form = max(self._used, key=lambda name: FORMATS[name].opset)
            raise PreconditionError(
                f"{form} weights need opset {self.least_opset} and the model has {now}; run upgrade-opset first "
                "(graphopt compress does so by itself)"
            )

    def run(self, model: ir.Model, context: Context) -> PassResult:
        gone = check_patterns(model, context.original, self.exclude, "exclude")
        gone += check_patterns(model, context.original, self.include, "include")
        weights, skipped = find_weights(model, self.exclude, self.include)
        result = PassResult(skipped=gone + skipped)
        chosen = self._chosen(model, weights, result, context)
        stored, spills = self._encoded(model, chosen, result, context)
        decoder = Decoder(model, value_names(model), opset(model))
        for weight, encoded in stored:
            result.changes.append(_change(weight, encoded))
            decoder.replace(weight, encoded)
        result.changes += shield(model) if result.changes else []
        for spill in spills:
            spill.keep(model)
        result.metrics = _metrics(stored)
        if not result.changes and not result.skipped:
            result.skipped.append(Skip("(graph)", "it has no weights of floats"))
        return result

    def _chosen(
        self, model: ir.Model, weights: list[Weight], result: PassResult, context: Context
    ) -> list[tuple[Weight, Layout]]:
        """The weights to store otherwise, each with how."""
        chosen: list[tuple[Weight, Layout]] = []
        for weight in weights:
            name = weight.value.name or "(unnamed)"
            form = self.formats.get(name, self.format)
            if form == "float":
                result.skipped.append(Skip(name, "it was assigned to stay in float"))
                continue
            layout = layout_of(weight, FORMATS[form], self.block, opset(model), kernel=self.kernel == "ort")
            why = no_gain(weight, layout)
            if why is None and not context.allows(self.name, name):
                why = OFF
            if why is not None:
                result.skipped.append(Skip(name, why))
                continue
            if layout.multiplied:
                wrong = undecodable(form, layout.block if layout.form.blocked else 0, layout.half, kernel=layout.kernel)
                if wrong is not None:
                    other = f"blocks of {layout.block}" if layout.form.blocked else "this format"
                    raise PreconditionError(
                        f"ONNX Runtime does not compute {form} weights in {other} right here ({wrong}); choose another "
                        "--block or --weights"
                    )
            chosen.append((weight, layout))
        return chosen

    def _seen(self, model: ir.Model, chosen: list[tuple[Weight, Layout]], context: Context) -> dict[int, list[Seen]]:
        """What the layers that read each weight (by its id) read besides, where all of them can tell."""
        if self.round_to not in ("auto", "data") or context.data is None or context.layer_inputs is None:
            return {}
        forms: dict[int, list[Form]] = {}
        for weight, layout in chosen:
            if layout.form.whole or (layout.form.bits == 8 and self.round_to == "auto"):
                continue
            found = [form_of(use.node) for use in weight.uses if use.via is None]
            if len(found) == len(weight.uses) and all(f is not None and fits(f, layout) for f in found):
                forms[id(weight)] = [f for f in found if f is not None]
        seen = context.layer_inputs(model, list(dict.fromkeys(f for some in forms.values() for f in some)))
        return {key: [seen[f] for f in some] for key, some in forms.items() if all(f in seen for f in some)}

    def _encoded(
        self, model: ir.Model, chosen: list[tuple[Weight, Layout]], result: PassResult, context: Context
    ) -> tuple[list[tuple[Weight, Encoded]], list[Spill]]:
        total = sum(weight.tensor.nbytes * (2 if layout.form.palette else 1) for weight, layout in chosen)
        done = 0
        spills: list[Spill] = []

        def told(size: int) -> None:
            nonlocal done
            done += size
            context.progress(done // 1_000_000, max(total // 1_000_000, 1), "compressing (MB)")

        def spill() -> Spill:
            if not spills:
                spills.append(Spill(context.scratch))
            return spills[0]

        encoder = Encoder(spill, told, context.threads)
        seen = self._seen(model, chosen, context)
        stored: list[tuple[Weight, Encoded]] = []
        for weight, layout in chosen:
            try:
                stored.append((weight, self._one(encoder, weight, layout, seen.get(id(weight), []))))
            except Unfit as error:
                result.skipped.append(Skip(weight.value.name or "(unnamed)", str(error)))
        return stored, spills

    def _one(self, encoder: Encoder, weight: Weight, layout: Layout, seen: list[Seen]) -> Encoded:
        fitted = self.round_to != "nearest" and layout.form.bits == 4
        given = rounded_for_outputs(weight.tensor, layout, seen) if seen and not layout.form.palette else None
        matters = importance(seen) if seen and layout.form.palette else None
        found = encoder.encode(weight.tensor, layout, fitted=fitted, given=given, importance=matters)
        found.refined = given is not None or matters is not None
        if layout.half and found.scale is not None:
            scale = found.scale.numpy()
            if not np.isfinite(scale).all() or ((scale < _LEAST_HALF) & (scale > 0)).any():
                return self._one(encoder, weight, replace(layout, half=False), seen)
        return found


def layout_of(weight: Weight, form: Format, block: int, version: int, *, kernel: bool = False) -> Layout:
    """How ``weight`` is stored in ``form``, at this opset; ``kernel``: for ONNX Runtime's own product where it fits."""
    shape, kinds = weight.shape, {use.kind for use in weight.uses}
    product = next((use for use in weight.uses if use.kind == "matmul"), None)
    size, rows = math.prod(shape), rows_of(weight)
    flipped = turned = table = False
    if form.whole:
        return Layout(form, shape, rows, size // rows, size // rows)
    if "gather" in kinds:
        table = True
    elif product is not None:
        flipped, turned = not product.flipped, True
        rows = shape[1] if flipped else shape[0]
    elif weight.role == "ConvTranspose" and len(shape) > 2 and _groups(weight) == 1:
        flipped = turned = True
        rows = size // shape[0]
    columns = size // rows
    if not form.blocked:
        block = columns
    elif product is None or table:
        block = fitting_block(columns, block) or block
    if table and form.bits == 4 and (block % 2 or columns % block):
        table = False
    if table and columns % block:
        table = False
    if kernel and turned and form.bits == 4 and not form.palette and columns % block == 0 and _plain_products(weight):
        return Layout(form, shape, rows, columns, block, flipped, kernel=True)
    found = Layout(form, shape, rows, columns, block, flipped, turned, table)
    if found.multiplied or columns % block:  # DequantizeLinear has its result in the type of its scales
        return replace(found, half=weight.tensor.dtype == ir.DataType.FLOAT16 and version >= 19)
    return replace(found, half=True)


def _plain_products(weight: Weight) -> bool:
    """Whether all that reads it is x W, or x W + b, the same way round, in float32."""
    same = len({use.flipped for use in weight.uses}) == 1 and {use.kind for use in weight.uses} == {"matmul"}
    scaled = any(
        attribute(use.node, name, usual) != usual
        for use in weight.uses
        for name, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
    )
    biased = all(len(use.node.inputs) < 3 or _is_row(use.node.inputs[2], weight) for use in weight.uses)
    return same and not scaled and biased and weight.tensor.dtype == ir.DataType.FLOAT


def _is_row(bias: ir.Value | None, weight: Weight) -> bool:
    """Whether Gemm's C is one number per output, as the kernel takes it."""
    outputs = weight.shape[0] if weight.uses[0].flipped else weight.shape[1]
    return bias is None or static_shape(bias) == (outputs,)


def _groups(weight: Weight) -> int:
    return max(int(attribute(use.node, "group", 1)) for use in weight.uses)


def no_gain(weight: Weight, layout: Layout) -> str | None:
    """Why the file would not get smaller; None: it would."""
    if weight.tensor.nbytes <= layout.stored_bytes + _OVERHEAD:
        if layout.form.whole and weight.tensor.dtype.bitwidth == 16:
            return f"it is stored in 16 bits already ({weight.tensor.dtype.name.lower()})"
        now = f"instead of {weight.tensor.nbytes}"
        return f"{layout.form.name} would take {layout.stored_bytes} bytes and what decodes it, {now}"
    return None


def _change(weight: Weight, stored: Encoded) -> Change:
    layout = stored.layout
    where = "" if layout.form.whole else f" in blocks of {layout.block}" if layout.form.blocked else " per channel"
    after = _bytes(stored)
    exact = math.isinf(stored.sqnr)
    loss = "exact" if exact else f"{stored.sqnr:.1f} dB"
    detail = f"{weight.role} weight, {weight.tensor.nbytes} -> {after} bytes, {layout.form.name}{where}, {loss}"
    return Change("compress", weight.value.name or "(unnamed)", detail)


def _bytes(stored: Encoded) -> int:
    return sum(int(part.nbytes) for part in (stored.codes, stored.scale, stored.zero, stored.book) if part is not None)


def _metrics(stored: list[tuple[Weight, Encoded]]) -> dict[str, Any]:
    """Bytes by what the runtime does with them."""
    packed = looked_up = loaded = 0
    for weight, encoded in stored:
        kinds = {use.kind for use in weight.uses}
        size = weight.tensor.nbytes
        if encoded.layout.multiplied and kinds == {"matmul"}:
            packed += size
        elif kinds == {"gather"} and (encoded.layout.table or encoded.layout.form.whole):
            looked_up += size
        else:
            loaded += size
    formats: dict[str, int] = {}
    for _, encoded in stored:
        formats[encoded.layout.form.name] = formats.get(encoded.layout.form.name, 0) + 1
    error, signal = (sum(getattr(e, key) for _, e in stored) for key in ("error", "signal"))
    return {
        "weights_compressed": len(stored),
        "weights_rounded_for_output": sum(encoded.refined for _, encoded in stored),
        "bytes_before": sum(weight.tensor.nbytes for weight, _ in stored),
        "bytes_after": sum(_bytes(encoded) for _, encoded in stored),
        "formats": formats,
        "weight_sqnr_db": round(10 * math.log10(signal / error), 2) if error and signal else None,
        "bytes_multiplied_packed": packed,
        "bytes_decoded_on_lookup": looked_up,
        "bytes_decoded_at_load": loaded,
    }
