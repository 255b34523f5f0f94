"""``inspect``: any model, nothing run, no data file opened, unknown is said."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import branch, external, externalize, function_model, mlp, model, nested, parsed, sparse, value, weight
from conftest import DATA, DEMO, MODELS, run_cli
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.errors import InputError, ModelError
from graphopt.inspection import inspect_model
from graphopt.report.inspection import print_inspection
from graphopt.weights import BITS

EVERY = sorted([*MODELS.glob("*.onnx"), DEMO / "digits.onnx"], key=lambda p: p.name)


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_every_fixture(path: Path) -> None:
    report = inspect_model(path)
    proto = onnx.load(path)
    assert report["path"] == str(path)
    assert report["bytes"] == path.stat().st_size
    assert report["ir_version"] == proto.ir_version
    assert report["nodes"] == sum(report["operators"].values()) >= len(proto.graph.node)
    assert [v["name"] for v in report["outputs"]] == [v.name for v in proto.graph.output]
    assert report["weight_bytes"] == sum(report["bytes_by_type"].values())
    assert report["largest"] == sorted(report["largest"], key=lambda t: (-t["bytes"], t["name"]))


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_the_text_has_the_reports_numbers(path: Path) -> None:
    ran = run_cli("inspect", path)
    assert ran.code == 0, ran.err
    report = inspect_model(path)
    assert re.search(rf"^nodes +{report['nodes']}\b", ran.out, re.MULTILINE)
    for port in (*report["inputs"], *report["outputs"]):
        assert f"{port['name']}  {port['type']}" in ran.out
    assert len(ran.out.splitlines()) <= 36  # one screen
    assert all(line == line.rstrip() for line in ran.out.splitlines())


def test_macs_and_parameters_of_a_known_model() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["z"]),
    ]
    weights = {"w": np.zeros((8, 3, 3, 3), np.float32), "m": np.zeros((8, 5), np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(a, name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    report = inspect_model(model)
    assert report["parameters"] == 8 * 27 + 40
    assert report["macs"] == 16 * 16 * 8 * 27 + 40
    assert report["macs_unknown_nodes"] == 0
    assert inspect_model(model, dims={"n": 4})["macs"] == 4 * report["macs"]
    assert report["inputs"] == [{"name": "x", "type": "float", "shape": ["n", 3, 16, 16]}]
    with pytest.raises(InputError, match="its inputs have n"):
        inspect_model(model, dims={"batch": 4})


def test_unknown_shapes_are_said_and_not_guessed() -> None:
    report = inspect_model(MODELS / "custom.onnx")
    assert report["macs_unknown_nodes"] > 0
    assert report["activation_peak"]["unknown_values"] > 0
    out = run_cli("inspect", MODELS / "custom.onnx").out
    assert f"? for {report['macs_unknown_nodes']} nodes of unknown shape or meaning" in out
    assert f"? for {report['activation_peak']['unknown_values']} values of unknown size" in out


def test_an_unknown_operator_is_counted_under_its_domain() -> None:
    assert inspect_model(MODELS / "custom.onnx")["operators"]["com.example::MysteryOp"] == 1


def test_subgraphs_are_counted() -> None:
    report = inspect_model(MODELS / "control.onnx")
    assert report["subgraphs"] == 3
    assert report["operators"]["If"] == report["operators"]["Loop"] == 1


def test_initializers_listed_as_inputs_are_no_inputs() -> None:
    assert [v["name"] for v in inspect_model(MODELS / "overridable.onnx")["inputs"]] == ["image"]


def test_coverage_of_a_quantized_model() -> None:
    assert inspect_model(MODELS / "shared.onnx")["quantization"] is None
    quantized = graphopt.quantize(MODELS / "shared.onnx", data=DATA / "shared.npz", time=0).model
    found = inspect_model(quantized)["quantization"]
    assert found["heavy_nodes_integer"] > 0
    assert found["heavy_nodes"] >= found["heavy_nodes_integer"]
    dynamic = graphopt.quantize(MODELS / "encoder.onnx", mode="dynamic", time=0).model
    assert inspect_model(dynamic)["quantization"]["heavy_nodes_integer"] > 0


def test_external_weights_are_counted_and_not_read(tmp_path: Path) -> None:
    onnx.save_model(
        onnx.load(MODELS / "shared.onnx"),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    (tmp_path / "m.data").unlink()
    report, plain = inspect_model(tmp_path / "m.onnx"), inspect_model(MODELS / "shared.onnx")
    assert report["external_bytes"] == report["weight_bytes"] == plain["weight_bytes"]
    assert plain["external_bytes"] == 0
    assert "of external weights" in run_cli("inspect", tmp_path / "m.onnx").out


def test_a_type_of_the_future_is_no_end() -> None:
    model = onnx.load(MODELS / "shared.onnx")
    model.graph.initializer[0].data_type = 77
    size = len(model.graph.initializer[0].raw_data)
    report = inspect_model(model, tree=True, deep=True)
    assert report["bytes_by_type"]["type 77"] == size


def test_sizes_of_element_types_are_onnx_irs() -> None:
    import onnx_ir as ir

    for kind in ir.DataType:
        if kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING):
            assert BITS[int(kind)] == kind.bitwidth


def test_several_models_stand_side_by_side(workplace: Path) -> None:
    first, second = MODELS / "gru.onnx", MODELS / "lstm.onnx"
    ran = run_cli("inspect", first, second)
    assert re.search(r"^operator +gru.onnx +lstm.onnx +ratio$", ran.out, re.MULTILINE)
    both = run_cli("inspect", first, second, "--json").json
    assert both["models"] == [inspect_model(str(first)), inspect_model(str(second))]


def test_standard_input() -> None:
    ran = run_cli("inspect", "-", "--json", stdin=(MODELS / "gru.onnx").read_bytes())
    assert ran.json["path"] is None
    assert ran.json["bytes"] > 0


# Waste


def test_duplicates_small_ones_surely_large_ones_probably_and_deep_surely() -> None:
    rng = np.random.default_rng(0)
    large, small = rng.standard_normal((64, 64)).astype(np.float32), np.ones(3, np.float32)
    other = large.copy()
    other[20, 20] += 1  # outside the samples
    arrays = {"a": large, "b": large, "c": other, "d": small, "e": small, "f": small.astype(np.float64)}
    adds = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in arrays]
    made = model(
        adds, [], [value(f"{n}_out", None) for n in arrays], [weight(n, a, a.dtype) for n, a in arrays.items()]
    )
    found = {tuple(d["names"]): d for d in inspect_model(made)["duplicates"]}
    assert found["a", "b", "c"]["certainty"] == "probable"
    assert found["d", "e"]["certainty"] == "equal"
    assert found["d", "e"]["wasted_bytes"] == 12
    assert "probably (--deep tells)" in printed(inspect_model(made))
    deep = {tuple(d["names"]): d["certainty"] for d in inspect_model(made, deep=True)["duplicates"]}
    assert deep == {("a", "b"): "equal", ("d", "e"): "equal"}


def test_duplicates_of_typed_data() -> None:
    tensors = [helper.make_tensor(n, TensorProto.INT64, [2], [1, 2]) for n in "ab"]
    made = model([helper.make_node("Add", ["a", "b"], ["y"])], [], [value("y", None)], tensors)
    assert [d["names"] for d in inspect_model(made)["duplicates"]] == [["a", "b"]]
    assert [d["names"] for d in inspect_model(made, deep=True)["duplicates"]] == [["a", "b"]]


def external_pair(folder: Path, second: int) -> Path:
    """Two weights of 32 bytes in one file, the other one at ``second``; both hold the same."""
    made = mlp(2)
    for tensor, offset in zip(made.graph.initializer, (0, second), strict=True):
        externalize(tensor, "w.bin", offset=offset, length=16)
    (folder / "w.bin").write_bytes(bytes(range(16)) * 2)
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    return folder / "m.onnx"


def test_external_tensors_share_bytes_or_are_told_by_deep(tmp_path: Path) -> None:
    (same,) = inspect_model(external_pair(tmp_path, 0))["duplicates"]
    assert (same["certainty"], same["wasted_bytes"]) == ("same bytes of the file", 0)
    apart = external_pair(tmp_path, 16)
    assert inspect_model(apart)["duplicates"] == []
    (found,) = inspect_model(apart, deep=True)["duplicates"]
    assert (found["certainty"], found["wasted_bytes"]) == ("equal", 16)
    (same,) = inspect_model(external_pair(tmp_path, 0), deep=True)["duplicates"]
    assert same["certainty"] == "same bytes of the file"


def test_deep_reads_through_the_gate(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(32))
    path = external(tmp_path / "m", "../secret", write=False)
    assert inspect_model(path, node="w")["node"][0]["values"] == "in a data file; --deep reads it"
    (one,) = inspect_model(external(tmp_path / "n"), deep=True, node="w")["node"]
    assert one["values"] == "0, 1, 2, 3, 4, 5, ... (from 0 to 7)"
    with pytest.raises(ModelError, match="outside the model's folder"):
        inspect_model(path, deep=True)


def test_dead_weights_and_nodes() -> None:
    made = model(
        [
            helper.make_node("Mul", ["x", "only_dead"], ["lost"]),
            helper.make_node(
                "If",
                ["c"],
                ["y"],
                then_branch=branch("t", [helper.make_node("Neg", ["inner"], ["o"])], "o"),
                else_branch=branch("e", [helper.make_node("Relu", ["x"], ["p"])], "p"),
            ),
        ],
        [value("x"), value("c", (), TensorProto.BOOL)],
        [value("y", None)],
        [weight(n, [1.0, 2.0]) for n in ("only_dead", "inner", "unused")],
    )
    report = inspect_model(made)
    assert [w["name"] for w in report["dead_weights"]] == ["only_dead", "unused"]
    assert report["dead_nodes"] == 1
    assert re.search(r"^  dead +2 tensors \(16 B\), 1 node$", printed(report), re.MULTILINE)


def test_scales_named_by_annotations_are_not_dead() -> None:
    made = mlp(2)
    made.graph.initializer.append(weight("scale", 1.0))
    note = made.graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    assert inspect_model(made)["dead_weights"] == []


# What it costs


def test_the_peak_of_activations() -> None:
    body = (
        "agraph (float[4] x) => (float[4] y) { a = Neg(x) b = Concat<axis=0>(a, a, a) c = Neg(b) y = Slice(c, s, e) }"
    )
    made = parsed(body.replace("{", "<int64[1] s = {0}, int64[1] e = {4}> {"))
    # Neg: x, a; Concat: a, b (x is gone); Neg: b, c; Slice: c, y
    assert inspect_model(made)["activation_peak"] == {"bytes": (12 + 12) * 4, "unknown_values": 0, "node": "c"}


def test_nothing_is_known_of_a_model_without_shapes() -> None:
    made = model(
        [helper.make_node("Op", ["x"], ["y"], domain="odd")], [value("x", None)], [value("y", None)], domains=["odd"]
    )
    report = inspect_model(made, tree=True, node="y")
    assert report["activation_peak"] == {"bytes": None, "unknown_values": 2, "node": None}
    assert (report["macs"], report["macs_unknown_nodes"]) == (None, 1)
    assert re.search(
        r"^MACs +\? for 1 node", printed({k: v for k, v in report.items() if k not in ("tree", "node")}), re.M
    )


def test_shapes_that_hang_on_data_are_followed() -> None:
    report = inspect_model(MODELS / "encoder.onnx", dims={"batch": 2, "sequence": 5})
    assert report["macs_unknown_nodes"] == report["activation_peak"]["unknown_values"] == 0
    assert report["macs"] > inspect_model(MODELS / "encoder.onnx")["macs"] > 10_000


@pytest.mark.parametrize(
    ("op_type", "domain", "inputs", "attributes", "expected"),
    [
        ("QLinearConv", "", ["x4", "s", "z", "k", "s", "z", "s", "z"], {}, 4 * 4 * 5 * 27),
        ("QLinearMatMul", "", ["a", "s", "z", "b", "s", "z", "s", "z"], {}, 2 * 3 * 4),
        ("FusedMatMul", "com.microsoft", ["a", "b"], {}, None),  # its output has no shape here
        ("Einsum", "", ["a", "b"], {"equation": "ij,jk->ik"}, 2 * 3 * 4),
        ("Einsum", "", ["a", "b"], {"equation": "...j,jk->...k"}, None),
        ("Attention", "com.microsoft", ["a", "b"], {}, None),
        ("SkipLayerNormalization", "com.microsoft", ["a", "b"], {}, 0),
        ("Normalizer", "ai.onnx.ml", ["a"], {}, 0),
        ("LinearRegressor", "ai.onnx.ml", ["a"], {}, None),
    ],
)
def test_macs_of_other_operators(
    op_type: str, domain: str, inputs: list[str], attributes: dict[str, str], expected: int | None
) -> None:
    shapes = {"x4": (1, 3, 6, 6), "k": (5, 3, 3, 3), "a": (2, 3), "b": (3, 4), "s": (), "z": ()}
    kinds = {"s": TensorProto.FLOAT, "a": TensorProto.FLOAT, "b": TensorProto.FLOAT}
    if op_type.startswith("QLinear"):
        kinds = {"s": TensorProto.FLOAT}
    fed = [value(n, shapes[n], kinds.get(n, TensorProto.UINT8)) for n in dict.fromkeys(inputs)]
    node = helper.make_node(op_type, inputs, ["y"], domain=domain, **attributes)
    made = model([node], fed, [value("y", None)], domains=[domain] if domain else [])
    report = inspect_model(made)
    assert report["macs"] == expected
    assert report["macs_unknown_nodes"] == (expected is None)


def test_functions_are_listed_and_what_they_compute_is_counted() -> None:
    made = function_model()
    report = inspect_model(made, tree=True)
    assert report["function_list"] == [{"name": "mine::AddK", "nodes": 2, "calls": 1}]
    assert report["operators"] == {"mine::AddK": 1}
    assert {row["operator"] for row in report["operator_costs"]} == {"Constant", "Add"}
    assert report["macs_unknown_nodes"] == 0
    assert "mine::AddK (2 nodes, 1 call)" in printed({k: v for k, v in report.items() if k != "tree"})


def test_a_weight_belongs_to_the_operator_that_computes_with_it() -> None:
    quantized = graphopt.quantize(MODELS / "shared.onnx", data=DATA / "shared.npz", time=0).model
    rows = {row["operator"]: row for row in inspect_model(quantized)["operator_costs"]}
    assert rows["Conv"]["weight_bytes"] > rows["DequantizeLinear"]["weight_bytes"]
    report = inspect_model(MODELS / "shared.onnx")
    assert sum(row["weight_bytes"] for row in report["operator_costs"]) == report["weight_bytes"]
    assert sum(row["macs"] or 0 for row in report["operator_costs"]) == report["macs"]


def test_ops_of_several_models_stand_side_by_side() -> None:
    ran = run_cli("inspect", MODELS / "gru.onnx", MODELS / "shared.onnx", "--ops")
    assert re.search(r"^operator +nodes +MACs +weights +nodes +MACs +weights$", ran.out, re.MULTILINE)
    assert re.search(r"^ +gru.onnx +shared.onnx$", ran.out, re.MULTILINE)


def test_dynamic_dims_say_where_they_stand() -> None:
    found = inspect_model(MODELS / "encoder.onnx", dims={"batch": 3})["dynamic_dims"]
    assert found[0] == {
        "name": "batch",
        "where": ["input input_ids axis 0", "input attention_mask axis 0", "output logits axis 0"],
        "counted_as": 3,
    }
    made = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", (None, 2))], [value("y", None)])
    assert inspect_model(made)["dynamic_dims"] == [{"name": None, "where": ["input x axis 0"], "counted_as": 1}]


# The tree


def scoped(*names: str, **metadata: list[str]) -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"], name=n) for i, n in enumerate(names)]
    for key, values in metadata.items():
        for node, text in zip(nodes, values, strict=True):
            node.metadata_props.add(key=key.replace("__", "."), value=text)
    return model(nodes, [value("v0")], [value(f"v{len(names)}")])


def paths(report: dict[str, object], prefix: str = "") -> dict[str, int]:
    """module -> nodes."""
    tree = report.get("tree", report)
    found = {prefix: tree["nodes"]}  # type: ignore[index]
    for child in tree["children"]:  # type: ignore[index]
        found.update(paths(child, f"{prefix}/{child['name']}"))
    return found


@pytest.mark.parametrize(
    "made",
    [
        scoped("/encoder/layer.0/act/Relu", "/encoder/layer.0/Relu", "/encoder/layer.1/Relu"),
        scoped(
            "a",
            "b",
            "c",
            pkg__torch__onnx__name_scopes=[
                "['', 'encoder', 'encoder.layer.0', 'encoder.layer.0.act', 'relu']",
                "['', 'encoder', 'encoder.layer.0', 'relu_1']",
                "['', 'encoder', 'encoder.layer.1', 'relu_2']",
            ],
        ),
        scoped(
            "a",
            "b",
            "c",
            namespace=[
                ": M/encoder: E/encoder.layer.0: L/encoder.layer.0.act: A/relu: aten.relu",
                ": M/encoder: E/encoder.layer.0: L/relu_1: aten.relu",
                ": M/encoder: E/encoder.layer.1: L/relu_2: aten.relu",
            ],
        ),
    ],
    ids=["names", "name_scopes", "namespace"],
)
def test_the_tree_of_modules(made: onnx.ModelProto) -> None:
    assert paths(inspect_model(made, tree=True)) == {
        "": 3,
        "/encoder": 3,
        "/encoder/layer.0": 2,
        "/encoder/layer.0/act": 1,
        "/encoder/layer.1": 1,
    }


def test_dotted_names_and_nonsense_in_metadata() -> None:
    assert paths(inspect_model(scoped("a.b.relu", "plain"), tree=True)) == {"": 2, "/a": 1, "/a/b": 1}
    odd = scoped("a", "b", "c", pkg__torch__onnx__name_scopes=["[[[", "17", "['', None]"])
    assert inspect_model(odd, tree=True)["tree"]["nodes"] == 3


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_the_nodes_add_up(path: Path) -> None:
    report = run_cli("inspect", path, "--nodes", "--json").json
    rows = report["node_costs"]
    assert sum(row["macs"] or 0 for row in rows) == (report["macs"] or 0)
    assert sum(row["macs"] is None for row in rows) == report["macs_unknown_nodes"]
    assert sum(row["weight_bytes"] for row in rows) == sum(r["weight_bytes"] for r in report["operator_costs"])
    main = [row["name"] for row in rows if row["graph"] == 0]
    assert main == [n.name for n in onnx.load(path).graph.node]
    text = run_cli("inspect", path, "--nodes").out
    assert all(row["name"] in text for row in rows)


def test_verbose_lists_every_dynamic_dim() -> None:
    names = [f"dim{index}" for index in range(9)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, names)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, names)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    content = helper.make_model(graph).SerializeToString()
    line = next(one for one in run_cli("inspect", "-", "-v", stdin=content).out.splitlines() if "dynamic dims" in one)
    assert all(name in line for name in names)


def test_the_tree_adds_up() -> None:
    report = run_cli("inspect", MODELS / "gru.onnx", "--tree", "--json").json
    assert report["tree"]["parameters"] == report["parameters"]
    assert report["tree"]["macs"] == report["macs"]
    out = run_cli("inspect", MODELS / "gru.onnx", "--tree").out
    assert re.search(r"^\(model\) +117 ", out, re.MULTILINE) or "(model)" in out
    assert re.search(r"^  cell ", out, re.MULTILINE)


# One node


def test_a_node_and_its_neighbours() -> None:
    (one,) = inspect_model(mlp(4), node="act")["node"]
    assert one["op_type"] == "Relu"
    assert one["inputs"] == [
        {"name": "h", "type": "float", "shape": ["batch", 4], "from": "MatMul first", "bytes": None}
    ]
    assert one["outputs"][0]["readers"] == ["MatMul second"]
    (by_value,) = inspect_model(mlp(4), node="h")["node"]
    assert by_value["name"] == "first"
    assert by_value["inputs"][1] == {"name": "w1", "type": "float", "shape": [4, 4], "from": "initializer", "bytes": 64}
    assert by_value["values"] is None
    (stored,) = inspect_model(mlp(4), node="w2")["node"]
    assert re.fullmatch(r"(-?[\d.]+, ){6}\.\.\. \(from -[\d.]+ to [\d.]+\)", stored["values"])
    assert stored["op_type"] is None
    assert stored["outputs"][0]["readers"] == ["MatMul second"]


def test_a_node_as_text(workplace: Path) -> None:
    ran = run_cli("inspect", MODELS / "shared.onnx", "--node", "Conv_conv1")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Conv_conv1  Conv\n")
    for line in ("  reads", "  attributes", "  makes", "<- initializer", "-> "):
        assert line in ran.out
    assert "did you mean 'Conv_conv1'" in run_cli("inspect", MODELS / "shared.onnx", "--node", "Conv_cnv1").error
    assert "--tree shows" in run_cli("inspect", MODELS / "shared.onnx", "--node", "zzzzzz").error


def test_a_node_with_bodies_and_in_one() -> None:
    found = inspect_model(MODELS / "control.onnx", node="If_chosen")["node"][0]
    assert found["attributes"]["then_branch"].startswith("body of")
    assert [port["from"] for port in found["captured"]] != []
    (inner,) = inspect_model(nested(3), node="o0")["node"]
    assert inner["graph"] > 0
    assert inner["inputs"][0]["from"] == "outer graph"


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--tree", "--ops"], "give one of them"),
        (["--tree", MODELS / "gru.onnx"], "one model"),
        (["--nodes", "--ops"], "give one of them"),
        (["--nodes", MODELS / "gru.onnx"], "--nodes looks at one model"),
        (["--node", "x", MODELS / "gru.onnx"], "one model"),
    ],
)
def test_usage(arguments: list[str | Path], fragment: str) -> None:
    ran = run_cli("inspect", MODELS / "shared.onnx", *arguments)
    assert ran.code == 2
    assert fragment in ran.error


# Any model


def printed(report: dict[str, object], **options: bool) -> str:
    stream = io.StringIO()
    print_inspection([report], stream=stream, **options)
    return stream.getvalue()


def odd_types() -> onnx.ModelProto:
    made = mlp(2)
    for kind in range(1, 29):
        name = f"t{kind}"
        made.graph.initializer.append(TensorProto(name=name, data_type=kind, dims=[4], raw_data=bytes(4)))
        made.graph.value_info.append(value(f"v{kind}", (2,), kind))
    return made


ODD = {
    "nothing": model([], [value("x")], [value("x")]),
    "no-shapes": model([helper.make_node("Relu", ["x"], ["y"])], [value("x", None)], [value("y", None)]),
    "no-name": model([helper.make_node("Split", ["x"], ["", "y"], num_outputs=2)], [value("x")], [value("y", None)]),
    "unknown-operator": model([helper.make_node("Nothing", ["x", ""], ["y"])], [value("x")], [value("y", None)]),
    "future-opset": model([helper.make_node("Relu", ["x"], ["y"])], [value("x")], [value("y")], opset=9999),
    "types": odd_types(),
    "sparse": model([helper.make_node("Add", ["x", "s"], ["y"])], [value("x", (4,))], [value("y", (4,))]),
    "negative-dims": model([helper.make_node("Relu", ["x"], ["y"])], [value("x", (-1, -7))], [value("y", None)]),
    "wrong-shapes": model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], [value("x", (3, 5))], [value("y", (9,))], [weight("w", [1.0])]
    ),
    "escape": model([helper.make_node("Relu", ["x"], ["y"], name="\x1b[31mred\n")], [value("x")], [value("y")]),
    "trees": model(
        [helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", nodes_values=[1.0] * 100)],
        [value("x")],
        [value("y", None)],
        domains=["ai.onnx.ml"],
    ),
    "function": function_model(),
    "nested": nested(12),
}
ODD["sparse"].graph.sparse_initializer.append(sparse())


@pytest.mark.parametrize("name", ODD)
def test_no_model_is_too_odd(name: str) -> None:
    made = ODD[name]
    before = made.SerializeToString()
    report = inspect_model(made, deep=name != "types", tree=True)
    assert made.SerializeToString() == before
    json.dumps(report)
    plain = {k: v for k, v in report.items() if k != "tree"}
    for text in (printed(plain, verbose=True), printed(plain, ops=True), printed(report, verbose=True)):
        assert "\x1b" not in text
    if made.graph.node:
        node = made.graph.node[0]
        named = inspect_model(made, node=node.name or next(n for n in node.output if n))
        assert "\x1b" not in printed(named)


def test_lists_of_trees_are_weights() -> None:
    report = inspect_model(ODD["trees"])
    assert report["largest"][0] == {"name": "y.nodes_values", "type": "float", "shape": [100], "bytes": 400}


# Speed


def test_onnx_is_all_it_needs() -> None:
    script = (
        "import sys; from graphopt.cli import run\n"
        f"for more in ([], ['--tree'], ['--ops'], ['--node', 'Conv_conv1'], ['--json']):\n"
        f"    assert run(['inspect', {str(MODELS / 'shared.onnx')!r}, *more]) == 0\n"
        "print({m.split('.')[0] for m in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = eval(done.stderr)
    assert "onnx" in loaded
    assert not loaded & {"onnx_ir", "onnxruntime", "onnxscript", "onnx_graphsurgeon", "networkx", "scipy", "sympy"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_18_gb_of_external_weights(tmp_path: Path) -> None:
    """tools/bench/inspection.py has the figures; here only that nothing is far off."""
    width, count, size = 1024, 500, 36_000_000
    nodes, weights = [], []
    for i in range(count):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, size // 4 // width])
        weights.append(externalize(tensor, "w.bin", offset=i * size, length=tensor.dims[0] * tensor.dims[1] * 4))
        nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
    made = model(nodes, [value("x", ("n", width))], [value("y0", None)], weights)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(count * size)
    script = (
        "import re, sys; from graphopt.cli import run\n"
        f"assert run(['inspect', {str(tmp_path / 'm.onnx')!r}]) == 0\n"
        # Not ru_maxrss: a child starts with its parent's, and pytest has grown by now.
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "18.00 GB of external weights" in done.stdout or "17.9" in done.stdout
    assert int(done.stderr) < 300_000
