"""A network pruned by Torch-Pruning (magnitude, global, no fine-tuning), for tools/bench/pruning.py.

    python torch_pruning_rival.py NAME MODEL.onnx SOURCE SAMPLE.npz AMOUNTS FOLDER

In an interpreter with torch, and with ``pip install torch-pruning`` (and ``pip install --no-deps onnx2torch``). NAME is
"digits CNN", "efficientnet-lite0" or "minilm", whose networks are there in torch and take their weights from SOURCE,
the model that was exported, or from a file beside it; any other MODEL.onnx is made a network by onnx2torch. The network
has to give MODEL.onnx's outputs before it is pruned. Writes FOLDER/AMOUNT.onnx for each share of the MACs that it gets
to, and prints why it got no further, in a few words.
"""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-call"
# (torch is not in the environment that the project is checked in)

from __future__ import annotations

import contextlib
import copy
import re
import sys
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch_pruning
from onnx_for_torch import prepare
from torch.utils.flop_counter import FlopCounterMode

TOOLS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOOLS), str(TOOLS / "realdata")]

WEIGHTED = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
STEPS = 400  # with round_to, 100 go from half of the MACs to 0.39 at once in the demo
SAME = 1e-3  # of the largest output: float32 in another order of sums


def network(name: str, model: Path, source: Path) -> Any:
    """The network in torch, with the weights of the ONNX model."""
    if name == "efficientnet-lite0":
        import efficientnet_export

        net = efficientnet_export.network()
        efficientnet_export.load(
            net, torch.load(source.with_name("weights.pth"), map_location="cpu", weights_only=True)
        )
        return net.eval()
    if name == "digits CNN":
        from fixtures.digits import DigitsNet

        net = DigitsNet()
        known = {
            i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in onnx.load(source).graph.initializer
        }
        missing, unexpected = net.load_state_dict(known, strict=False)
        if unexpected or not all(key.endswith("num_batches_tracked") for key in missing):
            raise ValueError(f"weights do not map: {missing} {unexpected}")
        return net.eval()
    if name == "minilm":
        from minilm_export import BertModel, SentenceEncoder

        folder, eager = source.parent, {"attn_implementation": "eager", "local_files_only": True}
        return SentenceEncoder(BertModel.from_pretrained(folder, **eager)).eval()
    return converted(prepare(onnx.load(model)))


def converted(proto: onnx.ModelProto) -> Any:
    """By onnx2torch, with constants that Torch-Pruning sees: it knows layers and parameters, but no buffers."""
    for module in ("torchvision", "torchvision.ops"):  # for NonMaxSuppression and RoiAlign alone: none is here
        sys.modules[module] = types.ModuleType(module)
    sys.modules["torchvision.ops"].roi_align = None  # type: ignore[attr-defined]
    from onnx2torch import convert

    net = convert(proto).eval()
    for node in list(net.graph.nodes):
        if node.op == "call_module" and type(net.get_submodule(node.target)).__name__ == "OnnxMatMul":
            left, right = node.args
            weight = net.get_buffer(right.target) if right.op == "get_attr" else None
            if weight is not None and weight.ndim == 2:
                linear = torch.nn.Linear(*weight.shape, bias=False)
                linear.weight.data = weight.T.contiguous()
                net.set_submodule(node.target, linear)
                node.args = (left,)
    net.graph.eliminate_dead_code()
    net.recompile()
    used = {node.target for node in net.graph.nodes if node.op == "get_attr"}
    for name, buffer in list(net.initializers.named_buffers()):
        if buffer.is_floating_point() and buffer.numel() > 1 and f"initializers.{name}" in used:
            del net.initializers._buffers[name]
            net.initializers.register_parameter(name, torch.nn.Parameter(buffer))
    return net


def last_layers(net: Any) -> list[Any]:
    """Those between which and an output there is no other layer with weights: their width is the output's."""
    if hasattr(net, "encoder"):  # BERT's code cannot be traced; all that adds to its residual stream is an output.dense
        return [layer for name, layer in net.named_modules() if name.endswith("output.dense")]
    graph = net.graph if isinstance(net, torch.fx.GraphModule) else torch.fx.symbolic_trace(net).graph
    found, seen, todo = [], set(), [node for node in graph.nodes if node.op == "output"]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        module = net.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, WEIGHTED):
            found.append(module)
        else:
            todo += node.all_input_nodes
    return found


def attentions(net: Any) -> list[Any]:
    """The parts that split what three layers give into heads."""
    return [part for part in net.modules() if hasattr(part, "num_attention_heads") and hasattr(part, "query")]


def settle(net: Any) -> None:
    """Tell the attention of the width that its heads have now."""
    for part in attentions(net):
        part.all_head_size = part.query.out_features
        part.attention_head_size = part.query.out_features // part.num_attention_heads


def breaking(net: Any, feeds: tuple[Any, ...]) -> list[Any]:
    """Layers after whose pruning alone the network does not run, since their width is written elsewhere in it."""
    found = []
    for name, layer in net.named_modules():
        if isinstance(layer, WEIGHTED):
            other = copy.deepcopy(net)
            graph = torch_pruning.DependencyGraph().build_dependency(other, feeds)
            same = other.get_submodule(name)
            try:
                graph.get_pruning_group(
                    same, graph.get_pruner_of_module(same).prune_out_channels, list(range(8))
                ).prune()
                outputs(other, feeds)
            except Exception:  # whatever it raises, it would in the pruning, too
                found.append(layer)
    print(f"{len(found)} layers are left as they are", file=sys.stderr)
    return found


def outputs(net: Any, feeds: tuple[Any, ...]) -> list[Any]:
    """What the network gives, as a list."""
    with torch.no_grad():
        given = net(*feeds)
    return list(given) if isinstance(given, list | tuple) else [given]


def count(net: Any, feeds: tuple[Any, ...]) -> int:
    """Operations of convolutions and matrix products, wherever in the network they are made."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*feeds)
    return int(counter.get_total_flops())


def check(net: Any, proto: onnx.ModelProto, arrays: dict[str, Any]) -> None:
    """Raise where the network is not the ONNX model's."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, arrays)
    for ours, theirs in zip(outputs(net, tensors(proto, arrays)), want, strict=True):
        if np.abs(ours.numpy() - theirs).max() > SAME * max(1e-6, np.abs(theirs).max()):
            raise ValueError("outputs of the network in torch are not the ONNX model's")


def tensors(proto: onnx.ModelProto, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """The sample in the order of the inputs."""
    return tuple(torch.from_numpy(np.asarray(arrays[value.name])) for value in proto.graph.input)


def export(net: Any, proto: onnx.ModelProto, feeds: tuple[Any, ...], target: Path) -> None:
    """With the ONNX model's names and its dynamic dims."""
    dynamic = {
        value.name: {
            i: f"{value.name}_{i}" for i, dim in enumerate(value.type.tensor_type.shape.dim) if dim.dim_value < 1
        }
        for value in [*proto.graph.input, *proto.graph.output]
    }
    torch.onnx.export(
        net,
        feeds,
        target,
        input_names=[value.name for value in proto.graph.input],
        output_names=[value.name for value in proto.graph.output],
        dynamic_axes=dynamic,
        opset_version=17,
        dynamo=False,
    )


def prune(
    net: Any, proto: onnx.ModelProto, feeds: tuple[Any, ...], ignored: list[Any], amounts: list[str], folder: Path
) -> str:
    """Prune in small steps, and export at each amount, the largest first; what is left if not all are met."""
    start = left = count(net, feeds)
    pruner = torch_pruning.pruner.MagnitudePruner(
        net,
        feeds,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.9,
        max_pruning_ratio=0.9,  # no layer is emptied
        iterative_steps=STEPS,
        ignored_layers=[*last_layers(net), *ignored],
        num_heads={layer: p.num_attention_heads for p in attentions(net) for layer in (p.query, p.key, p.value)},
        round_to=8,
    )
    wanted = sorted(amounts, key=float, reverse=True)
    for _ in range(STEPS):
        pruner.step()
        settle(net)
        left = count(net, feeds)
        while wanted and left <= float(wanted[0]) * start:
            export(net, proto, feeds, folder / f"{wanted.pop(0)}.onnx")
        if not wanted:
            break
    return f"leaves {left / start:.2f}"


def main() -> None:
    """Print one line of a few words: where it failed, or what is left."""
    name, model, source, sample, amounts, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    doing = "cannot convert"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            proto, arrays = onnx.load(model), dict(np.load(sample))
            feeds = tensors(proto, arrays)
            net = network(name, Path(model), Path(source))
            check(net, proto, arrays)
            doing, wanted = "cannot prune", (amounts.split(","), Path(folder))
            try:
                told = prune(net, proto, feeds, [], *wanted)
            except Exception:  # then without what makes it fail
                traceback.print_exc()
                net = network(name, Path(model), Path(source))
                told = prune(net, proto, feeds, breaking(net, feeds), *wanted)
    except Exception as error:  # whatever it raises is its row
        traceback.print_exc()
        operator = re.search(r"operation_type='(\w+)'", str(error))  # as onnx2torch says what it has no converter for
        told = f"{doing} {operator[1]}" if operator else f"{doing}: {type(error).__name__}"
    print(told)


if __name__ == "__main__":
    main()
