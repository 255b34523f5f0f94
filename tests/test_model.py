"""Models in and out: nothing lost, nothing of the caller's touched."""

from __future__ import annotations

import io
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt.errors import GraphoptError, InputError, ModelError
from graphopt.model import clone, fingerprint, graphs, interface, load, to_bytes, to_proto

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "models").glob("*.onnx"))


def unset_empty(message: Any) -> Any:
    """protobuf tells an empty string from an absent one; ONNX does not."""
    for field, content in message.ListFields():
        if field.message_type is not None:
            for inner in content if field.is_repeated else [content]:
                unset_empty(inner)
        elif not field.is_repeated and content in ("", b"", 0) and field.name in _EMPTY:
            message.ClearField(field.name)
    return message


_EMPTY = (
    "domain",
    "doc_string",
    "producer_name",
    "producer_version",
    "model_version",
    "name",
    "denotation",
    "overload",
)


def canonical(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in graphs(copy):
        known = {tensor.name for tensor in graph.initializer}  # a value_info only repeats what these say
        infos = sorted((v for v in graph.value_info if v.name not in known), key=lambda v: v.name)
        del graph.value_info[:]
        graph.value_info.extend(infos)
        for message in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
            sort_metadata(message)
    sort_metadata(copy)
    return unset_empty(copy)


def sort_metadata(message: Any) -> None:
    """It is a dictionary: its order says nothing."""
    message.metadata_props.sort(key=lambda entry: entry.key)


def assert_lossless(proto: onnx.ModelProto) -> None:
    result = canonical(to_proto(load(proto)))
    if result != (before := canonical(proto)):
        assert str(result) == str(before)
        assert result.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


def valid(proto: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError:
        return False
    return True


class TestWaysIn:
    @pytest.mark.parametrize("name", ["m.onnx", "with space.onnx", "模型 模型/数据.onnx", "-.onnx", "no_suffix"])
    @pytest.mark.parametrize("kind", [str, Path])
    def test_path(self, tmp_path: Path, name: str, kind: type) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(builders.relu().SerializeToString())
        assert canonical(to_proto(load(kind(path)))) == canonical(builders.relu())

    def test_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        builders.external(tmp_path)
        monkeypatch.chdir(tmp_path)
        assert load("m.onnx").graph.initializers["w"].const_value.numpy()[3] == 3

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_bytes(self, kind: type) -> None:
        assert canonical(to_proto(load(kind(builders.relu().SerializeToString())))) == canonical(builders.relu())

    def test_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = io.BytesIO(builders.relu().SerializeToString())
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": data}))
        assert len(load("-").graph) == 1

    @pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
    def test_a_proto_is_never_touched(self, path: Path) -> None:
        proto = onnx.load(path)
        before = proto.SerializeToString()
        model = load(proto)
        for node in list(model.graph):
            node.name = "edited"
        to_proto(model)
        fingerprint(model)
        assert proto.SerializeToString() == before

    def test_a_proto_with_everything_opaque_is_not_touched(self) -> None:
        proto = everything()
        before = proto.SerializeToString()
        to_proto(load(proto))
        assert proto.SerializeToString() == before

    def test_ir_model_is_copied(self) -> None:
        source = ir.from_proto(builders.mlp())
        model = load(source)
        model.graph.initializers["w1"].name = "other"
        assert "w1" in source.graph.initializers

    def test_ir_model_with_external_weights_is_mapped_through_the_gate(self, tmp_path: Path) -> None:
        model = load(ir.load(builders.external(tmp_path)))
        assert list(onnx.numpy_helper.to_array(to_proto(model).graph.initializer[0])) == list(range(8))
        outside = tmp_path / "in"
        path = builders.external(outside, "../w.bin")
        with pytest.raises(ModelError, match="outside the model's folder"):
            load(ir.load(path))

    def test_broken_ir_model(self) -> None:
        source = ir.from_proto(builders.relu())
        source.graph[0].replace_input_with(0, ir.Value(name="nowhere"))
        with pytest.raises(ModelError, match="'nowhere' before it is made"):
            load(source)

    def test_gs_graph_without_anybody_importing_surgery(self) -> None:
        code = (
            "import sys, onnx_graphsurgeon as gs, builders; from graphopt.model import load;"
            "graph = gs.import_onnx(builders.mlp());"
            "assert 'graphopt.surgery' not in sys.modules;"
            "assert len(load(graph).graph) == 3"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)

    @pytest.mark.parametrize("source", [3, None, ["m.onnx"], object()])
    def test_what_is_no_model(self, source: object) -> None:
        with pytest.raises(InputError, match="give a path, bytes"):
            load(source)


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"", "is empty"),
            (b"PK\x03\x04xxxx", "zip archive"),
            (b"\x89HDF\r\n", "HDF5"),
            (b"<?xml version", "XML"),
            (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
            (b"hello world, this is text", "not an ONNX model"),
            (bytes(range(256)), "not an ONNX model"),
            (onnx.TensorProto(name="t", dims=[1]).SerializeToString(), "not an ONNX model"),
            (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
        ],
    )
    def test_not_a_model(self, data: bytes, said: str) -> None:
        with pytest.raises(ModelError, match=said) as caught:
            load(data)
        assert len(str(caught.value).splitlines()) == 1

    def test_empty_proto(self) -> None:
        with pytest.raises(ModelError, match="no graph"):
            load(onnx.ModelProto())

    @pytest.mark.parametrize("name", ["missing.onnx", "folder", "nul\0.onnx", "a" * 300])
    def test_unreadable(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(InputError) as caught:
            load(str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1

    def test_names_that_break_the_line_are_escaped(self) -> None:
        proto = builders.relu()
        proto.graph.node[0].input[0] = "evil\n\x1b[31mname"
        with pytest.raises(ModelError) as caught:
            load(proto)
        assert str(caught.value).isprintable()

    def test_text_that_is_no_utf8(self) -> None:
        data = builders.mlp().SerializeToString().replace(b"second", b"\xff\xfecond")
        with pytest.raises(ModelError, match="no text"):
            load(data)

    def test_tensor_whose_bytes_are_not_its_shape(self) -> None:
        proto = builders.mlp()
        proto.graph.initializer[0].dims[0] = 2**40
        with pytest.raises(ModelError, match=r"'w1' holds 4096 bytes but its shape"):
            load(proto)

    @pytest.mark.filterwarnings("ignore")
    def test_random_damage_is_a_refusal_or_a_model(self) -> None:
        """Flip, cut and double bytes: never an exception of another kind, and what loads can be written."""
        logging.disable(logging.CRITICAL)
        rng = random.Random(0)
        seeds = [p.SerializeToString() for p in (everything(), builders.conditional(2), builders.function_model())]
        loaded, said = 0, list[str]()
        try:
            for _ in range(3000):
                data = bytearray(rng.choice(seeds))
                for _ in range(rng.randint(1, 4)):
                    at = rng.randrange(len(data))
                    action = rng.randrange(3)
                    if action == 0:
                        data[at] = rng.randrange(256)
                    elif action == 1:
                        del data[at : at + rng.randint(1, 8)]
                    else:
                        data[at:at] = data[at : at + rng.randint(1, 8)]
                try:
                    model = load(bytes(data))
                    to_bytes(model)
                    fingerprint(model)
                    loaded += 1
                except GraphoptError as error:
                    said.append(str(error))
        finally:
            logging.disable(logging.NOTSET)
        assert all(text.isprintable() for text in said)
        assert loaded > 50


def everything() -> onnx.ModelProto:
    """One of each thing that converters lose."""
    custom = helper.make_node("Custom", ["x", "w"], ["c"], name="custom", domain="mine", doc_string="doc")
    custom.metadata_props.add(key="k", value="v")
    custom.attribute.extend(
        [
            helper.make_attribute("ints", [1, 2]),
            helper.make_attribute("one_sparse", builders.sparse()),
            helper.make_attribute("after", 2.5, doc_string="why"),
            helper.make_attribute("kind", helper.make_map_type_proto(TensorProto.INT64, value_type("f"))),
            helper.make_attribute("raw", b"\xff\xfe"),
            helper.make_attribute("tensors", [builders.weight("t", [1.0])]),
        ]
    )
    custom.attribute.add(name="raws", type=onnx.AttributeProto.STRINGS, strings=[b"ok", b"\xff"])
    many = custom.attribute.add(name="many_sparse", type=onnx.AttributeProto.SPARSE_TENSORS)
    many.sparse_tensors.extend([builders.sparse(), builders.sparse()])
    zipmap = helper.make_node("ZipMap", ["c"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[1, 2])
    constant = helper.make_node("Constant", [], ["k"], sparse_value=builders.sparse())
    add = helper.make_node("Add", ["s1", "s2"], ["y"])
    proto = builders.model(
        [constant, custom, zipmap, add],
        [builders.value("x", ("batch", None, 3)), builders.value("w")],
        [builders.value("y", (4,)), helper.make_value_info("z", sequence_of_maps())],
        [builders.weight("w", [1.0, 2.0])],
        domains=["mine", "ai.onnx.ml"],
    )
    proto.producer_name, proto.producer_version, proto.domain = "me", "1", "org.me"
    proto.model_version, proto.doc_string, proto.graph.doc_string = 7, "model doc", "graph doc"
    proto.metadata_props.add(key="author", value="数据")
    proto.graph.metadata_props.add(key="g", value="1")
    proto.graph.initializer[0].doc_string = "a weight"
    proto.graph.initializer[0].metadata_props.add(key="t", value="2")
    proto.graph.input[0].doc_string = "pixels"
    proto.graph.input[0].metadata_props.add(key="i", value="3")
    proto.graph.input[0].type.denotation = "IMAGE"
    proto.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    proto.graph.sparse_initializer.extend([builders.sparse("s1"), builders.sparse("s2")])
    note = proto.graph.quantization_annotation.add(tensor_name="x")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    info = proto.training_info.add()
    info.algorithm.CopyFrom(helper.make_graph([helper.make_node("Neg", ["w"], ["w2"])], "train", [], []))
    info.update_binding.add(key="w", value="w2")
    return proto


def value_type(_: str) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(TensorProto.FLOAT, [])


def sequence_of_maps() -> onnx.TypeProto:
    return helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value_type("f")))


class TestRoundTrip:
    def test_everything(self) -> None:
        assert_lossless(everything())

    @pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
    def test_fixtures(self, path: Path) -> None:
        assert_lossless(onnx.load(path))

    def test_backend_cases(self, record_property: Any) -> None:
        """All cases of onnx.backend.test, those on disk and those made in memory."""
        logging.disable(logging.CRITICAL)
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # onnx's own reference code divides by zero on purpose
            from onnx.backend.test.case import model as model_cases
            from onnx.backend.test.case import node as node_cases

            found = [*node_cases.collect_testcases(None), *model_cases.collect_testcases()]
        folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
        protos = [case.model for case in found if case.model is not None]
        protos += [onnx.load(path) for path in sorted(folder.rglob("*.onnx"))]
        count = 0
        for proto in protos:
            result = to_proto(load(proto))
            assert canonical(result) == canonical(proto) or str(canonical(result)) == str(canonical(proto))
            assert valid(result) == valid(proto)
            count += valid(result)
        logging.disable(logging.NOTSET)
        record_property("cases", len(protos))
        assert len(protos) >= 1500
        assert count >= 0.99 * len(protos)

    @pytest.mark.parametrize(
        "name",
        ["BFLOAT16", "FLOAT16", "DOUBLE", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "FLOAT4E2M1", "INT2", "STRING",
         "BOOL", "COMPLEX64", "INT8", "UINT64"],
    )  # fmt: skip
    def test_tensor_types(self, name: str) -> None:
        if not hasattr(TensorProto, name):
            pytest.skip(f"this onnx has no {name}")
        kind = getattr(TensorProto, name)
        filled = [b"a", "é".encode(), b"\xff"] if name == "STRING" else [1, 0, 1]
        tensor = helper.make_tensor("w", kind, [3], filled)
        proto = builders.model(
            [helper.make_node("Identity", ["w"], ["y"])], [], [builders.value("y", (3,), kind)], [tensor]
        )
        assert_lossless(proto)
        if name != "STRING":
            data = ir.from_proto(tensor).tobytes()
            assert load(proto).graph.initializers["w"].const_value.tobytes() == data

    def test_optional_and_sequence_types(self) -> None:
        tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 2])
        kinds = [
            helper.make_sequence_type_proto(tensor),
            helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor)),
            helper.make_map_type_proto(TensorProto.STRING, tensor),
            helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [3]),
            onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(domain="d", name="n")),
        ]
        for kind in kinds:
            infos = [helper.make_value_info(name, kind) for name in ("x", "y")]
            assert_lossless(builders.model([helper.make_node("Identity", ["x"], ["y"])], infos[:1], infos[1:]))

    def test_types_of_equal_names_in_two_bodies(self) -> None:
        proto = builders.conditional()
        first, second = (a.g for a in proto.graph.node[0].attribute)
        first.output[0].type.CopyFrom(sequence_of_maps())
        second.output[0].type.CopyFrom(helper.make_map_type_proto(TensorProto.STRING, value_type("f")))
        assert_lossless(proto)

    def test_functions(self) -> None:
        proto = builders.function_model()
        function = proto.functions[0]
        function.doc_string = "adds k"
        function.metadata_props.add(key="a", value="b")
        function.value_info.extend([builders.value("a"), builders.value("k")])
        function.attribute.append("alpha")
        function.attribute_proto.append(helper.make_attribute("beta", 2.0))
        assert_lossless(proto)

    def test_old_ir_version_and_opset_stay(self) -> None:
        assert_lossless(builders.parsed("agraph (float[2] x) => (float[2] y) { y = Relu(x) }", opset=7, ir_version=3))

    def test_attributes_without_a_type_are_read_by_content(self) -> None:
        proto = builders.model(
            [helper.make_node("LeakyRelu", ["x"], ["y"], alpha=0.5)], [builders.value("x")], [builders.value("y")]
        )
        proto.graph.node[0].attribute[0].ClearField("type")
        assert load(proto).graph[0].attributes["alpha"].value == 0.5

    def test_sparse_initializer_follows_a_rename(self) -> None:
        model = load(everything())
        next(v for node in model.graph for v in node.outputs if v.name == "s1").name = "renamed"
        result = to_proto(clone(model))
        assert [s.values.name for s in result.graph.sparse_initializer] == ["renamed", "s2"]
        assert result.graph.node[-1].input[0] == "renamed"

    def test_twice_is_as_once(self) -> None:
        once = to_bytes(load(everything()))
        assert to_bytes(load(once)) == once


class TestClone:
    def test_no_edit_shows_in_the_original(self) -> None:
        for proto in (everything(), builders.conditional(2), builders.function_model()):
            model = load(proto)
            before = to_bytes(model)
            copy = clone(model)
            copy.metadata_props["new"] = "1"
            copy.doc_string = "edited"
            copy.graph.opset_imports["x"] = 1
            copy.graph.metadata_props["new"] = "1"
            for graph in [*copy.graphs(), *(f.graph for f in copy.functions.values())]:
                for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
                    if value.type is not None:
                        value.dtype = ir.DataType.INT8
                    value.metadata_props["new"] = "1"
                    if "quant_parameter_tensor_names" in value.meta:
                        value.meta["quant_parameter_tensor_names"]["new"] = "1"
                for node in graph:
                    node.name = "edited"
                    node.metadata_props["new"] = "1"
                    node.attributes["new"] = ir.AttrInt64("new", 1)
                for value in list(graph.initializers.values()):
                    value.name = f"{value.name}_new"
            copy.functions.clear()
            assert to_bytes(model) == before

    def test_weights_are_shared(self) -> None:
        model = load(builders.mlp())
        assert clone(model).graph.initializers["w1"].const_value is model.graph.initializers["w1"].const_value


class TestFingerprint:
    def test_equal_models(self) -> None:
        assert fingerprint(load(builders.mlp())) == fingerprint(load(builders.mlp()))
        model = load(everything())
        assert fingerprint(model) == fingerprint(clone(model)) == fingerprint(load(to_proto(model)))

    def test_external_weights_count_like_inline_ones(self, tmp_path: Path) -> None:
        model = load(builders.external(tmp_path))
        assert fingerprint(model) == fingerprint(load(to_proto(model)))

    def test_changes_with_everything(self) -> None:
        def edits(proto: onnx.ModelProto) -> list[onnx.ModelProto]:
            found: list[onnx.ModelProto] = []

            def edited() -> onnx.ModelProto:
                found.append(onnx.ModelProto())
                found[-1].CopyFrom(proto)
                return found[-1]

            data = bytearray(proto.graph.initializer[1].raw_data)
            data[-1] ^= 1
            edited().graph.initializer[1].raw_data = bytes(data)
            edited().graph.initializer[1].doc_string = "doc"
            edited().graph.initializer[1].metadata_props.add(key="a", value="b")
            edited().graph.initializer[1].data_type = TensorProto.INT32
            edited().graph.initializer[1].dims[:] = [64, 16]
            edited().graph.node[0].name = "other"
            edited().graph.node[0].doc_string = "doc"
            edited().graph.node[0].attribute.append(helper.make_attribute("a", 1))
            edited().graph.doc_string = "doc"
            edited().doc_string = "doc"
            edited().metadata_props.add(key="a", value="b")
            edited().graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
            edited().training_info.add().update_binding.add(key="a", value="b")
            edited().opset_import[0].version += 1
            return found

        proto = builders.mlp()
        prints = [fingerprint(load(p)) for p in [proto, *edits(proto)]]
        assert len(set(prints)) == len(prints)

    def test_leaves_the_model_alone(self) -> None:
        model = load(builders.mlp())
        before = to_bytes(model)
        fingerprint(model)
        assert to_bytes(model) == before
        assert model.graph.initializers["w1"].const_value.shape == [32, 32]

    def test_the_same_for_every_hash_seed(self) -> None:
        code = (
            "import hashlib, test_model as t; from graphopt.model import *;"
            "m = load(t.everything()); print(fingerprint(m), hashlib.sha256(to_bytes(m)).hexdigest())"
        )
        outputs = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed},
                cwd=Path(__file__).parent,
                check=True,
                capture_output=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(outputs) == 1


def test_interface_leaves_out_initializers() -> None:
    inputs, outputs = interface(load(everything()))
    assert [str(i) for i in inputs] == ["float32[batch,?,3]"]
    assert [str(o) for o in outputs] == ["float32[4]", "not a tensor[...]"]


def test_too_large_for_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.model.PROTO_LIMIT", 1000)
    with pytest.raises(ModelError, match="2 GB"):
        to_bytes(load(builders.mlp()))


def test_numpy_view_of_every_type_is_the_stored_bytes() -> None:
    from graphopt.model import tensor_buffer

    for name in ("BFLOAT16", "FLOAT8E5M2", "INT4", "FLOAT", "INT64"):
        tensor = ir.from_proto(helper.make_tensor("w", getattr(TensorProto, name), [3], [1, 2, 3]))
        assert bytes(tensor_buffer(tensor)) == tensor.tobytes()
    assert bytes(tensor_buffer(ir.tensor(np.zeros((0, 3), np.float32)))) == b""
    assert bytes(tensor_buffer(ir.tensor(np.arange(6).reshape(2, 3).T))) == np.arange(6).reshape(2, 3).T.tobytes()
