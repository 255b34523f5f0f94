"""Writing the nodes that turn what is stored into the weight again, in the form that the runtime runs fastest.

Three forms, as measured on ONNX Runtime 1.32 (docs/compress.md): DequantizeLinear in front of a MatMul or Gemm becomes
one kernel that multiplies packed integers; a lookup picks rows of integers and decodes those; everything else is
written in plain arithmetic, which the runtime folds when it loads the model, so that it costs no time afterwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.graph import bodies, fresh, label, nodes
from graphopt.passes._encode import Encoded
from graphopt.passes._layout import KERNEL_DOMAIN, kernel_sizes
from graphopt.passes._weight_uses import Use, Weight
from graphopt.passes._weights import add_tensor, drop_unread


class Decoder:
    """Replaces weights; what several readers of one weight share is written once."""

    def __init__(self, model: ir.Model, taken: set[str], version: int) -> None:
        self.model = model
        self.taken = taken
        self.version = version
        self.order = {node: index for index, node in enumerate(nodes(model))}
        self.around = {body: node for node in self.order for body in bodies(node)}

    def replace(self, weight: Weight, stored: Encoded) -> None:
        """Let every reader of ``weight`` read ``stored``."""
        one = _Decoding(self, weight, stored)
        for use in sorted(weight.uses, key=lambda use: use.kind == "gather"):  # a lookup is taken out of the graph
            if use.kind == "matmul" and stored.layout.multiplied and use.flipped != stored.layout.flipped:
                one.matmul(use)
            elif use.kind == "gather" and (stored.layout.table or stored.layout.form.whole):
                one.gather(use)
            elif use.via is not None:
                use.via.replace_input_with(0, one.whole())
            else:
                use.node.replace_input_with(use.index, one.whole())
        for via in {use.via for use in weight.uses if use.via is not None}:
            if next(iter(via.outputs[0].uses()), None) is None and via.graph is not None:
                via.graph.remove([via], safe=True)
        drop_unread(weight.value)


class _Decoding:
    """One weight: its constants, and the decoded forms asked for so far."""

    def __init__(self, owner: Decoder, weight: Weight, stored: Encoded) -> None:
        self.owner, self.weight, self.stored = owner, weight, stored
        self.graph = weight.graph
        self.base = weight.value.name or f"{label(weight.first)}_weight"
        self.site = self._site()
        self.kept: dict[str, ir.Value] = {}
        self.constants: dict[str, ir.Value] = {}

    def _site(self) -> ir.Node:
        """The first node of the weight's own graph that depends on it."""
        producer = self.weight.value.producer()
        found: list[ir.Node] = []
        for use in self.weight.uses:
            node: ir.Node | None = use.via or use.node
            while node is not None and node.graph is not self.graph:
                node = self.owner.around.get(node.graph) if isinstance(node.graph, ir.Graph) else None
            if node is not None:
                found.append(node)
        if producer is not None and not found:
            return producer
        return min(found, key=lambda node: self.owner.order.get(node, 0)) if found else self.graph[0]

    def constant(self, name: str, tensor: ir.TensorProtocol | np.ndarray[Any, Any]) -> ir.Value:
        """A constant of the weight's, once."""
        if name not in self.constants:
            held = ir.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor
            self.constants[name] = add_tensor(
                self.owner.model, self.graph, f"{self.base}_{name}", held, self.owner.taken, self.site
            )
        return self.constants[name]

    def add(self, op_type: str, inputs: list[ir.Value], suffix: str, site: ir.Node, **attributes: Any) -> ir.Value:
        """A new node in front of ``site``; its output."""
        node = ir.node(op_type, inputs, attributes=attributes or None)
        node.name = fresh(f"{self.base}_{suffix}", self.owner.taken)
        node.outputs[0].name = fresh(f"{self.base}_{suffix}_out", self.owner.taken)
        graph = site.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(site, [node])
        return node.outputs[0]

    def matmul(self, use: Use) -> None:
        """DequantizeLinear, right in front of the product, which reads [inputs, outputs]; or the kernel itself."""
        if self.stored.layout.kernel:
            self._kernel(use.node)
            return
        use.node.replace_input_with(use.index, self.dequantized())
        if use.node.op_type == "Gemm":
            use.node.attributes["transB"] = ir.AttrInt64("transB", 0)

    def _kernel(self, node: ir.Node) -> None:
        """ONNX Runtime's product by packed integers in place of MatMul or Gemm."""
        stored, layout = self.stored, self.stored.layout
        assert stored.scale is not None
        inputs: list[ir.Value | None] = [node.inputs[0], self.constant("quantized", stored.codes)]
        inputs.append(self.constant("scale", stored.scale))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if stored.zero is not None or bias is not None:
            inputs.append(None if stored.zero is None else self.constant("zero_point", stored.zero))
        if bias is not None:
            inputs += [None, bias]
        made = ir.node("MatMulNBits", inputs, attributes=kernel_sizes(layout), domain=KERNEL_DOMAIN)
        made.name = node.name
        self.owner.model.graph.opset_imports.setdefault(KERNEL_DOMAIN, 1)
        graph, old, new = node.graph, node.outputs[0], made.outputs[0]
        assert isinstance(graph, ir.Graph)
        graph.insert_before(node, [made])
        new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
        new.metadata_props.update(old.metadata_props)
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove([node], safe=True)
        new.name = name

    def dequantized(self) -> ir.Value:
        """The stored matrix through DequantizeLinear, as it lies."""
        if "dequantized" not in self.kept:
            stored, layout = self.stored, self.stored.layout
            assert stored.scale is not None
            inputs = [self.constant("quantized", stored.codes), self.constant("scale", self._scale())]
            if stored.zero is not None:
                inputs.append(self.constant("zero_point", stored.zero))
            channel, along = (1, 0) if layout.turned else (0, 1)
            blocked = layout.blocks > 1 or layout.form.blocked
            how = {"axis": along, "block_size": layout.block} if blocked else {"axis": channel}
            found = self.add("DequantizeLinear", inputs, "dequantize", self.site, **how)
            found.type = ir.TensorType(ir.DataType.FLOAT16 if layout.half else ir.DataType.FLOAT)
            self.kept["dequantized"] = self._as_weight_type(found, "dequantized_cast", self.site, layout.half)
        return self.kept["dequantized"]

    def _scale(self) -> ir.TensorProtocol:
        assert self.stored.scale is not None
        layout = self.stored.layout
        if layout.form.blocked or layout.table or layout.blocks > 1:
            return self.stored.scale
        return ir.tensor(self.stored.scale.numpy().reshape(-1))

    def whole(self) -> ir.Value:
        """The weight as it was, decoded once: in its own type and shape."""
        if "whole" not in self.kept:
            self.kept["whole"] = self._whole()
        return self.kept["whole"]

    def _whole(self) -> ir.Value:
        layout = self.stored.layout
        if layout.form.whole:
            return self._as_weight_type(self.constant("stored", self.stored.codes), "decode", self.site, False)
        turned = layout.turned and not layout.flipped
        wanted = (layout.columns, layout.rows) if turned else layout.shape
        if layout.columns % layout.block:  # no Mul can spread these scales
            found = self.dequantized()
            now: tuple[int, ...] = (layout.columns, layout.rows) if layout.turned else (layout.rows, layout.columns)
        else:
            found, now = self._scaled(self._codes(None, self.site), None, self.site)
            found = self._as_weight_type(found, "decode", self.site, False)
        found = self._shaped(found, wanted) if now != wanted else found
        if turned:
            found = self.add("Transpose", [found], "transpose", self.site, perm=[1, 0])
        found.type, found.shape = ir.TensorType(self.weight.tensor.dtype), ir.Shape(layout.shape)
        return found

    def _shaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        name = "shape_" + "x".join(map(str, shape))
        return self.add("Reshape", [value, self.constant(name, np.asarray(shape, np.int64))], "reshape", self.site)

    def _codes(self, indices: ir.Value | None, site: ir.Node) -> ir.Value:
        """The integers as float32 (of a palette: its entries), rows picked where there are ``indices``."""
        layout, stored = self.stored.layout, self.stored
        codes = self.constant("quantized", stored.codes)
        if indices is not None:
            codes = self.add("Gather", [codes, indices], "rows", site, axis=0)
        if layout.table and layout.form.bits == 4:
            four = self.constant("four", np.asarray(4, np.uint8))
            high = self.add("BitShift", [codes, four], "high", site, direction="RIGHT")
            up = self.add("BitShift", [codes, four], "up", site, direction="LEFT")
            low = self.add("BitShift", [up, four], "low", site, direction="RIGHT")
            codes = self.add("Concat", [low, high], "nibbles", site, axis=-1)
        if stored.book is not None:
            index = self.add("Cast", [codes], "index", site, to=int(ir.DataType.INT32))
            return self.add("Gather", [self.constant("palette", stored.book), index], "look_up", site, axis=0)
        return self.add("Cast", [codes], "float", site, to=int(ir.DataType.FLOAT))

    def _scaled(self, codes: ir.Value, indices: ir.Value | None, site: ir.Node) -> tuple[ir.Value, tuple[int, ...]]:
        """``(codes - zero point) * scale``, float32, and its shape (without ``indices``)."""
        layout, stored = self.stored.layout, self.stored
        assert stored.scale is not None
        now: tuple[int, ...] = (layout.columns, layout.rows) if layout.turned else (layout.rows, layout.columns)
        if layout.table:
            now = (layout.rows, layout.blocks, layout.block)
        elif layout.blocks > 1:
            turned = (layout.blocks, layout.block, layout.rows)
            now = turned if layout.turned else (layout.rows, layout.blocks, layout.block)
            codes = self._shaped(codes, now)
        if layout.table and layout.form.codes == "int4":  # half a byte has no sign
            codes = self.add("Sub", [codes, self.constant("eight", np.asarray(8, np.float32))], "signed", site)
        for name, tensor in (("zero", stored.zero), ("scale", stored.scale)):
            if tensor is None:
                continue
            plain = tensor.numpy().astype(np.uint8) if name == "zero" else tensor.numpy()
            value = self.constant(f"{name}s", np.ascontiguousarray(self._spreading(plain)))
            if indices is not None:
                value = self.add("Gather", [value, indices], f"{name}_rows", site, axis=0)
            if plain.dtype != np.float32:
                value = self.add("Cast", [value], f"{name}_float", site, to=int(ir.DataType.FLOAT))
            codes = self.add("Sub" if name == "zero" else "Mul", [codes, value], f"{name}d", site)
        return codes, now

    def _spreading(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Scales or zero points with the dims that broadcast them over their blocks."""
        layout = self.stored.layout
        if layout.table:
            return values
        if layout.blocks > 1:
            return values[:, None, :] if layout.turned else values[:, :, None]
        return values.reshape(1, -1) if layout.turned else values.reshape(-1, 1)

    def gather(self, use: Use) -> None:
        """Rows are looked up as they are stored, and decoded then."""
        layout, node = self.stored.layout, use.node
        indices = node.inputs[1]
        assert indices is not None
        if layout.form.whole:
            rows = self.add("Gather", [self.constant("stored", self.stored.codes), indices], "rows", node, axis=0)
            result = self._as_weight_type(rows, "decode", node, False)
        else:
            rows, _ = self._scaled(self._codes(indices, node), indices, node)
            lead = self.add("Shape", [indices], "indices_shape", node)
            width = self.constant("width", np.asarray([layout.columns], np.int64))
            shape = self.add("Concat", [lead, width], "rows_shape", node, axis=0)
            result = self.add("Reshape", [rows, shape], "row", node)
            result = self._as_weight_type(result, "decode", node, False)
        old = node.outputs[0]
        result.type, result.shape, result.doc_string = old.type, old.shape, old.doc_string
        result.metadata_props.update(old.metadata_props)
        name = old.name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        graph.remove([node], safe=True)
        result.name = name

    def _as_weight_type(self, value: ir.Value, suffix: str, site: ir.Node, half: bool) -> ir.Value:
        """``value`` in the type the weight had."""
        wanted = self.weight.tensor.dtype
        stored = self.stored.layout.form
        now = _types(stored.codes) if stored.whole else (ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
        return value if now == wanted else self.add("Cast", [value], suffix, site, to=int(wanted))


def _types(codes: str) -> ir.DataType:
    return ir.DataType.FLOAT16 if codes == "float16" else ir.DataType.BFLOAT16
