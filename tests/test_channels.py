"""Groups of channels: what goes together does, what must stay does, and removing what nobody heard changes nothing."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, parsed, value, weight
from hypothesis import HealthCheck, Phase, given, settings
from onnx import helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import growing_channels
from architectures import ARCHITECTURES, Net, feeds
from growing_layers import Made
from prune_exactly import examine

from graphopt.channels import Channels, find_channels
from graphopt.concrete_shapes import two_sizes
from graphopt.errors import RuntimeFailure
from graphopt.model import load
from graphopt.passes.prune import left_alone


def found(proto: onnx.ModelProto, feed: dict[str, np.ndarray] | None = None) -> Channels:
    loaded = load(proto)
    return find_channels(loaded, two_sizes(loaded, feed if feed is not None else feeds(proto, 1), threads=1))


def groups(proto: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Group -> (units, those that may go)."""
    return {group.name: (len(group.units), group.free) for group in found(proto).groups}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removing_what_nobody_heard_changes_nothing(name: str) -> None:
    proto = ARCHITECTURES[name]()
    done = examine(proto, [feeds(proto, 1), feeds(proto, 2, 24)], random.Random(0))
    assert not done.problems
    assert done.removed >= 4


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(growing_channels.graphs())
def test_nor_does_it_in_random_graphs(made: Made) -> None:
    try:
        done = examine(made.model, made.feeds, random.Random(0))
    except RuntimeFailure:  # an operator that this runtime lacks for that type
        return
    assert not done.problems


def test_random_graphs_have_something_to_remove() -> None:
    made = [growing_channels.make(random.Random(seed)) for seed in range(8)]
    assert sum(examine(m.model, m.feeds, random.Random(0)).removed > 0 for m in made) >= 4


def test_a_residual_spine_is_one_group() -> None:
    spine = next(g for g in found(ARCHITECTURES["resnet"]()).groups if g.name == "Conv_10")
    assert groups(ARCHITECTURES["resnet"]())["Conv_0"] == (16, 16)
    assert [node.name for node in spine.layers] == ["Conv_10"]
    layers = [len(g.layers) for g in found(ARCHITECTURES["resnet"]()).groups]
    assert layers == [2, 1, 1, 2, 1]  # stem with the first block's end; the second block's end with its projection


def test_heads_are_units() -> None:
    heads = [g for g in found(ARCHITECTURES["transformer"]()).groups if len(g.layers) == 3]
    assert [(len(g.units), g.free) for g in heads] == [(4, 4), (4, 4)]
    assert groups(ARCHITECTURES["packed_attention"]())["MatMul_0"] == (8, 8)


def test_hidden_units_go_through_every_gate_and_both_directions() -> None:
    assert list(groups(ARCHITECTURES["recurrent"]()).values()) == [(24, 24), (24, 24), (10, 0)]


def test_concatenated_channels_stay_apart() -> None:
    assert list(groups(ARCHITECTURES["densenet"]()).values())[:3] == [(16, 16), (24, 24), (8, 8)]


REASONS = {
    "Softmax": ("y = Softmax <axis=1> (h)", "Softmax 'n' sums over it"),
    "ReduceMean": ("y = ReduceMean <keepdims=0> (h, one)", "ReduceMean 'n' reduces it"),
    "CumSum": ("y = CumSum (h, axis)", "CumSum 'n' runs along it"),
    "unknown": ("y = com.example.Strange (h)", "Strange 'n' has no rule"),
    "output": ("y = Relu (h)", "'y' is a graph output"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_stays_has_a_reason(name: str) -> None:
    """One layer of 4 channels, and an operator behind it that needs all of them."""
    text, reason = REASONS[name]
    rank = "[N]" if name == "ReduceMean" else "[N, 4]"
    body = f"""agraph (float[N, 2] x) => (float{rank} y)
        <float[2, 4] w = {{1,2,3,4,5,6,7,8}}, int64[1] one = {{1}}, int64 axis = {{1}}>
        {{ h = MatMul (x, w) {text} }}"""
    proto = parsed(body)
    proto.graph.node[1].name = "n"
    if name == "unknown":
        proto.opset_import.append(helper.make_opsetid("com.example", 1))
    shapes = [{"x": (n, 2), "h": (n, 4), "y": (n, 4) if rank != "[N]" else (n,)} for n in (1, 2)]
    channels = find_channels(load(proto), shapes)
    assert channels.groups[0].free == 0
    assert channels.groups[0].reason == reason


def test_what_a_body_reads_stays() -> None:
    then = helper.make_graph([helper.make_node("Relu", ["h"], ["a"])], "then", [], [value("a", None)])
    other = helper.make_graph([helper.make_node("Neg", ["h"], ["b"])], "else", [], [value("b", None)])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="layer"),
        helper.make_node("If", ["c"], ["i"], name="if", then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["i", "v"], ["y"], name="last"),
    ]
    inputs = [value("x", ("N", 3)), value("c", (), onnx.TensorProto.BOOL)]
    weights = [weight("w", np.ones((3, 4))), weight("v", np.ones((4, 2)))]
    proto = model(nodes, inputs, [value("y", ("N", 2))], weights)
    channels = found(proto, {"x": np.ones((1, 3), np.float32), "c": np.asarray(True)})
    assert (channels.groups[0].free, channels.groups[0].reason) == (0, "If 'if' has no rule")


def test_one_size_alone_does_not_free_anything() -> None:
    """A Reshape to a computed shape whose channel axis is the length of another one only at the first size."""
    net = Net()
    x = net.dense("x", 4, 8)
    length = net.op("Gather", net.op("Shape", "x"), net.keep(1, np.int64), axis=0)
    target = net.op("Concat", net.ints(1), net.op("Unsqueeze", length, net.ints(0)), net.ints(-1), axis=0)
    y = net.op("Reshape", net.op("Transpose", x, perm=[2, 0, 1]), target)
    proto = net.model(net.op("ReduceMax", y, axes=[0], keepdims=0), ("N", "T", 4))
    assert found(proto, {"x": np.ones((1, 8, 4), np.float32)}).groups[0].free == 0


def test_an_overridable_weight_stays() -> None:
    proto = ARCHITECTURES["vgg"]()
    name = proto.graph.initializer[0].name
    proto.graph.input.append(value(name, tuple(proto.graph.initializer[0].dims)))
    channels = found(proto, feeds(proto, 1))
    assert channels.groups[0].name != "Conv_0"
    reasons = {skip.site: skip.reason for skip in left_alone(channels)}
    assert "is a graph input" in reasons["Conv_0"]


def test_places_told_by_number_need_a_length_that_does_not_vary() -> None:
    """The last element of all of a batch is another channel's with another batch."""
    net = Net()
    flat = net.op("Reshape", net.conv("x", 3, 8, 1), net.ints(-1))
    proto = net.model(net.op("Gather", flat, net.ints(5), axis=0), ("N", 3, 4, 4))
    channels = found(proto, {"x": np.ones((1, 3, 4, 4), np.float32)})
    assert channels.groups[0].free == 0
    assert any("its length varies" in reason for reason in channels.stays.values())
