"""How much of a model a set of layers is, in multiply-accumulates and in weight bytes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from graphopt.base import Context
from graphopt.cost import node_macs, shapes
from graphopt.data import feeds as to_feeds
from graphopt.errors import RuntimeFailure
from graphopt.graph import constant_array, is_op, nodes
from graphopt.model import graphs, interface, to_proto, weight_bytes
from graphopt.passes._placement import Layer
from graphopt.session import Session


class Coverage:
    """MACs and weight bytes of the float model, taken before it is changed."""

    def __init__(self, model: ir.Model, context: Context) -> None:
        proto = to_proto(model)
        inputs, _ = interface(model)
        first = next(iter(context.data), None) if context.data is not None else None
        feed = to_feeds(first, inputs) if first is not None else {}
        known = shapes(proto, {name: array.shape for name, array in feed.items()})
        missing = [n for n in proto.graph.node if node_macs(n, known) is None]
        if missing and feed:
            # Shapes that depend on data are looked up in one run (of the main graph: bodies cannot be tapped).
            names = sorted({v for n in missing for v in (*n.input[:2], n.output[0]) if v and v not in known})
            try:  # an empty list would mean all outputs
                seen = Session(model, taps=names, threads=context.threads).run(feed, names) if names else {}
                known |= {name: array.shape for name, array in seen.items()}
            except RuntimeFailure:  # a value the runtime cannot hand out stays unknown
                pass
        self.macs = {tuple(node.output): node_macs(node, known) for graph in graphs(proto) for node in graph.node}
        constants = [constant_array(n.outputs[0]) for n in nodes(model) if is_op(n, "Constant")]
        self.bytes = weight_bytes(model) + sum(int(array.nbytes) for array in constants if array is not None)

    def of(self, layers: list[Layer]) -> dict[str, Any]:
        """Shares that the layers hold, in percent (None where a shape is unknown)."""
        mine = [self.macs.get(tuple(v.name or "" for v in layer.node.outputs)) for layer in layers]
        total = [m for m in self.macs.values() if m is not None]
        weights = {id(layer.weight): constant_array(layer.weight) for layer in layers}
        stored = sum(int(array.nbytes) for array in weights.values() if array is not None)
        known = all(m is not None for m in mine) and all(m is not None for m in self.macs.values())
        share = 100 * sum(m or 0 for m in mine) / sum(total) if sum(total) else None
        return {
            "layers_quantized": len(layers),
            "macs_percent": round(share, 2) if share is not None else None,
            "macs_complete": known,
            "weight_bytes_percent": round(100 * stored / self.bytes, 2) if self.bytes else None,
        }
