"""graphopt finetune: what was lost comes back, honestly judged; reproducible, resumable, as a pass and as a verb."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from conftest import DATA, MODELS, run_cli
from onnx import TensorProto, helper, numpy_helper
from test_schema import check

import graphopt
from graphopt.errors import InputError, NothingDone, PreconditionError
from graphopt.graph import constant_array
from graphopt.model import load
from graphopt.passes._shadows import shadow
from graphopt.qdq import is_dq, parameters
from graphopt.session import Session
from graphopt.storage import save
from graphopt.training import Variable
from graphopt.training.losses import LOSS, Objective, Pair, parse
from graphopt.training.optimizers import Optimizer, cosine
from graphopt.training.steps import Steps

Watch = Callable[[Path], AbstractContextManager[None]]
RNG = np.random.default_rng(3)


def r(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def small(hidden: int = 12, scale: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """image [batch, 1, 6, 6] -> logits [batch, 3] and a probability: Conv, Relu, Gemm, Softmax."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((hidden, 1, 3, 3)) * 0.5,
        "b1": rng.standard_normal(hidden) * 0.1,
        "w2": rng.standard_normal((hidden, 3)) * scale,
        "b2": np.zeros(3),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["a"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["a"], ["h"], name="relu"),
        helper.make_node("GlobalAveragePool", ["h"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["logits"], name="head"),
    ]
    image = helper.make_tensor_value_info("image", 1, ["batch", 1, 6, 6])
    logits = helper.make_tensor_value_info("logits", 1, ["batch", 3])
    stored = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    graph = helper.make_graph(nodes, "small", [image], [logits], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def images() -> dict[str, Any]:
    return {"image": RNG.standard_normal((120, 1, 6, 6)).astype(np.float32)}


@pytest.fixture(scope="module")
def quantized(images: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small`` in int8 with its weights cut to 3 bits."""
    model = graphopt.quantize(small(), data=images, time=0, allow_slower=True).ir_model
    for node in model.graph:
        stored, form = (
            constant_array(node.inputs[0]) if is_dq(node) else None,
            parameters(node) if is_dq(node) else None,
        )
        if stored is None or form is None or form.kind == "int32":
            continue
        zero = form.zero.reshape(-1)[0]
        centred = stored.astype(np.int32) - zero
        coarse = np.rint(centred / np.abs(centred).max() * 3).astype(np.int32)
        factor = np.float32(np.abs(centred).max() / 3)
        for value, array in (
            (node.inputs[0], (coarse + zero).astype(stored.dtype)),
            (node.inputs[1], form.scale * factor),
        ):
            assert value is not None
            value.const_value = ir.tensor(array, name=value.name)
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    save(model, path)
    return path


def error_of(model: Any, images: dict[str, Any]) -> float:
    """Mean squared distance to the teacher's logits."""
    teacher, student = Session(small(), threads=1), Session(load(model), threads=1)
    gaps = [
        teacher.run({"image": i[None]})["logits"] - student.run({"image": i[None]})["logits"] for i in images["image"]
    ]
    return float(np.mean(np.square(gaps)))


def test_a_quantized_student_gets_nearer_and_stays_in_integers(quantized: Path, images: dict[str, Any]) -> None:
    fresh = {"image": np.random.default_rng(9).standard_normal((60, 1, 6, 6)).astype(np.float32)}
    result = graphopt.finetune(quantized, teacher=small(), data=images, eval_data=fresh, steps=80, lr=1e-2, time=0)
    assert error_of(result.model, fresh) < 0.4 * error_of(quantized, fresh)
    before, after = load(quantized), load(result.model)
    assert [n.op_type for n in before.graph] == [n.op_type for n in after.graph]
    changed = 0
    for old, new in zip(before.graph, after.graph, strict=True):
        a, b = (constant_array(n.inputs[0]) if is_dq(n) else None for n in (old, new))
        if a is None or b is None or str(a.dtype) == "int32":
            continue
        zero = parameters(new).zero.reshape(-1)[0]  # type: ignore[union-attr]
        assert a.dtype == b.dtype
        assert np.abs(b.astype(int) - zero).max() <= 3  # three bits stay three bits
        changed += int((a != b).sum())
    assert changed
    for node in after.graph:  # what the runtime adds in int32 has the scale of its products
        if node.op_type == "Conv":
            x, w, bias = (parameters(node.inputs[i].producer()) for i in range(3))  # type: ignore[union-attr, arg-type]
            assert x is not None
            assert w is not None
            assert bias is not None
            np.testing.assert_allclose(bias.scale.reshape(-1), x.scale.reshape(-1) * w.scale.reshape(-1), rtol=1e-6)
    check(result.report, "made")  # docs/report.schema.json
    entry = result.report["ledger"][-1]
    assert entry["metrics"]["judged_low"] > 0
    assert entry["metrics"]["best_step"] > 0


def test_the_same_seed_gives_the_same_model(quantized: Path, images: dict[str, Any]) -> None:
    def made(seed: int) -> bytes:
        done = graphopt.finetune(quantized, teacher=small(), data=images, steps=20, seed=seed, time=0, lr=1e-2)
        return done.model.SerializeToString()

    assert made(4) == made(4)
    assert made(4) != made(5)


def test_a_training_that_was_interrupted_goes_on(quantized: Path, images: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"teacher": small(), "data": images, "steps": 24, "time": 0, "lr": 1e-2}
    whole = graphopt.finetune(quantized, **options).model.SerializeToString()
    state = tmp_path / "c.npz"

    class Stop(BaseException):
        pass

    def stop(done: int, total: int | None, what: str) -> None:
        if what == "training" and done == 13:
            raise Stop

    with pytest.raises(Stop):
        graphopt.finetune(quantized, checkpoint=state, progress=stop, **options)
    resumed = graphopt.finetune(quantized, resume=state, **options)
    assert resumed.model.SerializeToString() == whole
    with pytest.raises(InputError, match="of another training"):
        graphopt.finetune(quantized, resume=state, **{**options, "lr": 2e-2})


def test_a_smaller_student_learns_from_another_architecture(images: dict[str, Any]) -> None:
    student = small(hidden=6, seed=5)
    before = student.SerializeToString()
    result = graphopt.finetune(student, teacher=small(), data=images, steps=100, lr=1e-2, time=0, loss=["mse"])
    assert error_of(result.model, images) < 0.3 * error_of(student, images)
    assert student.SerializeToString() == before  # the caller's model is never touched


def test_labels_alone_teach_too(images: dict[str, Any]) -> None:
    scores = Session(small(), threads=1).run(images)["logits"]
    data = {**images, "label": scores.argmax(axis=1)}
    student = small()
    bias = np.asarray([4, -4, 0], np.float32)
    student.graph.initializer[3].CopyFrom(numpy_helper.from_array(bias, "b2"))
    options: dict[str, Any] = {"loss": ["cross-entropy"], "steps": 60, "lr": 2e-2, "time": 0, "metric": "accuracy"}
    result = graphopt.finetune(student, teacher=small(), data=data, eval_data=data, **options)
    assert result.report["metric"]["difference"] > 0.2


def test_a_loss_of_the_users_own_and_inner_values(images: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "own.onnx"
    onnx.save(_own_loss(), path)
    options: dict[str, Any] = {"teacher": small(), "data": images, "steps": 40, "lr": 1e-2, "time": 0}
    student = small(scale=0.2)
    result = graphopt.finetune(student, loss=[str(path)], match=["h=h"], **options)
    assert error_of(result.model, images) < 0.7 * error_of(student, images)


def _own_loss() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Sub", ["logits", "teacher/logits"], ["d"]),
        helper.make_node("Abs", ["d"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["out"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info(n, 1, ["N", 3]) for n in ("logits", "teacher/logits")]
    graph = helper.make_graph(nodes, "loss", inputs, [helper.make_tensor_value_info("out", 1, [])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_nothing_to_win_is_said_and_nothing_written(images: dict[str, Any]) -> None:
    with pytest.raises(NothingDone, match="training made nothing better"):
        graphopt.finetune(small(), teacher=small(), data=images, steps=20, time=0)
    with pytest.raises(NothingDone, match="nothing to train"):
        graphopt.finetune(small(), teacher=small(), data=images, steps=20, time=0, freeze=["*"])


def test_a_metric_that_does_not_rise_is_not_accepted(images: dict[str, Any]) -> None:
    student = small(scale=0.99)
    data = {**images, "label": Session(student, threads=1).run(images)["logits"].argmax(axis=1)}
    with pytest.raises(NothingDone, match=r"accuracy 1\.0000 -> .* though the loss fell"):
        graphopt.finetune(student, teacher=small(), data=data, steps=20, time=0, metric="accuracy")


def test_samples_of_many_lengths() -> None:
    rng = np.random.default_rng(2)
    samples = []
    for length in [5, 6, 9, 12] * 6:
        ids = rng.integers(1, 200, (1, length))
        samples.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    student = load(MODELS / "encoder.onnx")
    for value in student.graph.initializers.values():
        array = constant_array(value)
        if array is not None and array.dtype == np.float32 and array.ndim == 2:
            value.const_value = ir.tensor((array * np.float32(0.8)).astype(np.float32), name=value.name)
    result = graphopt.finetune(student, teacher=MODELS / "encoder.onnx", data=samples, steps=20, batch=4, time=0)
    metrics = result.report["ledger"][-1]["metrics"]
    assert metrics["samples_stacked"]
    assert metrics["judged_after"] < 0.8 * metrics["judged_before"]


def test_few_samples_still_train_stop_and_judge_apart(images: dict[str, Any]) -> None:
    few = {"image": images["image"][:12]}
    result = graphopt.finetune(small(scale=0.2), teacher=small(), data=few, steps=20, lr=1e-2, time=0)
    m = result.report["ledger"][-1]["metrics"]
    assert (m["samples_trained"], m["samples_held_out"], m["judged_samples"]) == (8, 2, 2)
    with pytest.raises(PreconditionError, match="finetune needs 10 samples or more"):
        graphopt.finetune(small(), teacher=small(), data={"image": images["image"][:9]}, time=0)


def test_frozen_weights_stay(images: dict[str, Any]) -> None:
    student = small(scale=0.2)
    result = graphopt.finetune(student, teacher=small(), data=images, steps=20, time=0, lr=1e-2, freeze=["Conv"])
    old, new = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (student, result.model))
    assert np.array_equal(old["w1"], new["w1"])
    assert not np.array_equal(old["w2"], new["w2"])
    assert "frozen, as asked" in {s["reason"] for s in result.report["ledger"][-1]["skipped"]}


def test_fake_quantized_weights_of_a_framework_go_out_as_integers() -> None:
    data = dict(np.load(DATA / "fakequant.npz"))
    teacher = load(MODELS / "fakequant.onnx")
    student = load(MODELS / "fakequant.onnx")
    for value in student.graph.initializers.values():
        array = constant_array(value)
        if array is not None and array.ndim > 1:
            value.const_value = ir.tensor((array * 0.7).astype(np.float32), name=value.name)
    result = graphopt.finetune(student, teacher=teacher, data=data, steps=40, lr=1e-2, time=0)
    weights = [n for n in load(result.model).graph if is_dq(n) and constant_array(n.inputs[0]) is not None]
    assert len(weights) >= 3
    assert {str(constant_array(n.inputs[0]).dtype) for n in weights} <= {"int8", "uint8", "int32"}  # type: ignore[union-attr]


def test_as_a_pass_its_teacher_is_what_the_run_started_from(images: dict[str, Any]) -> None:
    student = small()
    result = graphopt.optimize(student, passes=[_worse, "finetune"], data=images, time=0, verify="off")
    assert result.report["ledger"][-1]["status"] == "changed"
    assert result.report["comparison"]["outputs"][0]["sqnr_db"] > 20


def _worse(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.5), "w2"))
    return made


def test_masks_settings_and_tables_are_left_alone() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N] ids, float[N,3] x) => (float[N,3] out)
        <float[4,3] table = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0,1.0,2.0,3.0}, float[3] mask = {0.0, -1.0e9, 0.0},
         float[3] gain = {1.0, 2.0, 3.0}>
        { row = Gather(table, ids)  a = Add(row, mask)  b = Mul(a, gain)  out = Add(b, x) }"""
    )
    found = shadow(load(model), (), "weights")
    assert [v.name for v in found.variables] == ["gain"]
    assert {s.site for s in found.frozen} == {"table", "mask"}


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_losses_are_what_they_are_called(kind: str) -> None:
    s, t = r(5, 7), r(5, 7)
    objective = Objective(parse([kind]), (Pair("s", "t"),), 3.0, {"t": float(t.var())})
    found = float(Session(objective.alone(17), threads=1).run({"s": s, "teacher/t": t}, [LOSS])[LOSS])

    def logsoftmax(x: Any) -> Any:
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    a, b = logsoftmax(t / 3), logsoftmax(s / 3)
    wanted = 9 * np.mean(np.sum(np.exp(a) * (a - b), axis=1)) if kind == "kl" else np.mean((s - t) ** 2) / t.var()
    assert found == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimizers_find_the_minimum(kind: str) -> None:
    wanted = {"a": r(6), "b": np.float32(np.asarray([0.25, 4.0]))}
    variables = [Variable("a", r(6)), Variable("b", np.asarray([1.0, 1.0], np.float32), positive=True)]
    optimizer = Optimizer(kind, variables)
    for step in range(400):
        optimizer.step({v.name: 2 * (v.value - wanted[v.name]) for v in variables}, cosine(step, 400, 0.05))
    for variable in variables:
        np.testing.assert_allclose(variable.value, wanted[variable.name], atol=0.02)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "kld"], "unknown loss 'kld'; did you mean 'kl'?"),
        (["--loss", "missing.onnx"], "cannot read the loss missing.onnx"),
        (["--match", "h"], "match is 'h'; write STUDENT=TEACHER"),
        (["--match", "h=hh"], "the teacher has no value 'hh'"),
        (["--lr", "-1"], "lr is -1"),
        (["--loss", "cross-entropy"], "needs labels and sample"),
        (["--resume", "none.npz"], "no checkpoint none.npz"),
        (["--resume", "student.onnx"], "is no checkpoint"),
        (["--optimizer", "adamw"], "did you mean 'adam'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    options: list[str], message: str, images: dict[str, Any], workplace: Path, untouched: Watch
) -> None:
    onnx.save(small(), "teacher.onnx")
    onnx.save(small(scale=0.5), "student.onnx")
    np.savez("d.npz", **images)
    base = [
        "finetune",
        "student.onnx",
        "-o",
        "out.onnx",
        "--teacher",
        "teacher.onnx",
        "--data",
        "d.npz",
        "--steps",
        "5",
    ]
    with untouched(workplace):
        ran = run_cli(*base, "--time", "0", *options)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_what_cannot_fit_is_told(images: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="needs a teacher"):
        graphopt.finetune(small(), data=images)
    with pytest.raises(InputError, match="needs samples"):
        graphopt.finetune(small(), teacher=small())
    other = small()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "scores"
    renamed = graphopt.finetune(small(scale=0.3), teacher=other, data=images, steps=30, lr=1e-2, time=0)
    assert renamed.report["ledger"][-1]["status"] == "changed"  # one output on either side: matched by position
    other.graph.output.append(helper.make_tensor_value_info("h", 1, None))
    with pytest.raises(PreconditionError, match="no float output in common"):
        graphopt.finetune(small(), teacher=other, data=images, steps=5, time=0)


def test_the_verb_prints_how_the_training_went(quantized: Path, images: dict[str, Any], workplace: Path) -> None:
    onnx.save(small(), "teacher.onnx")
    np.savez("d.npz", **images)
    base = ["finetune", quantized, "-o", "out.onnx", "--teacher", "teacher.onnx", "--data", "d.npz", "--time", "0"]
    ran = run_cli(*base, "--steps", "40", "--lr", "0.01")
    assert ran.code == 0, ran.err
    assert "trained: loss" in ran.out
    assert "WARNING" not in ran.out
    onnx.checker.check_model(onnx.load("out.onnx"), full_check=True)
    ran = run_cli("finetune", "teacher.onnx", "-o", "no.onnx", *base[4:], "--steps", "5")
    assert ran.code == 3
    assert not Path("no.onnx").exists()


def test_weights_inside_a_branch_learn(images: dict[str, Any]) -> None:
    def model(factor: float) -> onnx.ModelProto:
        made: onnx.ModelProto = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[N,1,6,6] image) => (float[N,1,6,6] out)
            <float low = {{-1.0e9}}>
            {{
                total = ReduceSum<keepdims=0>(image)
                positive = Greater(total, low)
                out = If (positive) <
                    then_branch = t () => (float[N,1,6,6] p)
                        {{ inner = Constant<value = float[2] {{{factor}, 0.5}}>()
                           a, b = Split<axis=0>(inner)
                           q = Mul(image, a)
                           p = Add(q, b) }},
                    else_branch = f () => (float[N,1,6,6] s) {{ s = Identity(image) }}
                >
            }}"""
        )
        return made

    result = graphopt.finetune(model(3.0), teacher=model(2.0), data=images, steps=60, lr=2e-2, time=0)
    body = result.model.graph.node[-1].attribute
    stored = [
        numpy_helper.to_array(a.t) for item in body for n in item.g.node for a in n.attribute if a.name == "value"
    ]
    assert stored[0][0] == pytest.approx(2.0, abs=0.1)


def test_frozen_tables_are_held_once_whatever_the_lengths(workplace: Path) -> None:
    """A text model has a graph for each length; its embedding table stays out of them, and is not trained."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((8192, 64)).astype(np.float32)
    weight = rng.standard_normal((64, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
        helper.make_node("ReduceMean", ["y"], [LOSS], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info(LOSS, TensorProto.FLOAT, [])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    steps = Steps(model, [Variable("w", weight.copy())], threads=1)
    for length in (2, 3, 5):
        ids = rng.integers(0, 8192, length)
        loss, gradients = steps.gradients({"ids": ids})
        assert loss == pytest.approx(float((table[ids] @ weight).mean()), rel=1e-5)
        expected = np.repeat(table[ids].mean(axis=0)[:, None] / 4, 4, axis=1)
        np.testing.assert_allclose(gradients["w"], expected, rtol=1e-4, atol=1e-6)
        assert list(gradients) == ["w"]
    held = [g.concrete.model.ByteSize() for g in steps._graphs.values()]
    assert len(held) == 3
    assert max(held) < 100_000, "2 MB of table are not in any of them"
