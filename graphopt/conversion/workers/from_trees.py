"""XGBoost (``.json``, ``.ubj``), LightGBM (``.txt``) and CatBoost (``.cbm``): boosters saved by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job


def convert(job: Job) -> None:
    """Export with onnxmltools (CatBoost: its own), run the booster on random rows."""
    {"xgboost": _xgboost, "lightgbm": _lightgbm, "catboost": _catboost}[job.kind](job)


def _rows(job: Job, width: int) -> list[Any]:
    if job.data is not None:
        rows = next(iter(job.data.values())).astype("float32").reshape(-1, width)
        return [rows[k : k + 1] for k in range(min(job.count, len(rows)))] + [rows[: 8 * job.count]]
    return [job.drawn("float32", (size, width)) for size in (*[1] * (job.count - 1), 64)]


def _opset(job: Job) -> int:
    return min(job.opset, 15)  # what onnxmltools' tree converters were written for


def _xgboost(job: Job) -> None:
    job.need("xgboost", "onnxmltools", "packaging")
    import json

    import onnxmltools
    import xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    job.framework = f"xgboost {xgboost.__version__}"
    job.converter = f"onnxmltools {onnxmltools.__version__}"
    booster = xgboost.Booster()
    booster.load_model(str(job.source))
    objective = json.loads(booster.save_config())["learner"]["objective"]["name"]
    if objective.startswith(("rank:", "survival:")):
        raise job.Refused(f"onnxmltools does not convert the objective {objective} of {job.source.name}")
    width = booster.num_features()
    booster.feature_names = None  # the converter wants f0, f1, ...
    classifying = objective in ("binary:logistic", "multi:softprob", "multi:softmax")
    model = (xgboost.XGBClassifier if classifying else xgboost.XGBRegressor)()
    model.load_model(str(job.source))
    model.get_booster().feature_names = None
    proto = onnxmltools.convert_xgboost(
        model, initial_types=[("X", FloatTensorType([None, width]))], target_opset=_opset(job)
    )
    job.target.write_bytes(proto.SerializeToString())
    for rows in _rows(job, width):
        if classifying:
            job.sample([rows], [model.predict(rows), model.predict_proba(rows)])
        else:
            job.sample([rows], [model.predict(rows).reshape(-1, 1)])


def _lightgbm(job: Job) -> None:
    job.need("lightgbm", "onnxmltools", "packaging")
    import lightgbm
    import numpy
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    job.framework = f"lightgbm {lightgbm.__version__}"
    job.converter = f"onnxmltools {onnxmltools.__version__}"
    booster = lightgbm.Booster(model_file=str(job.source))
    width = booster.num_feature()
    proto = onnxmltools.convert_lightgbm(
        booster, initial_types=[("X", FloatTensorType([None, width]))], target_opset=_opset(job), zipmap=False
    )
    job.target.write_bytes(proto.SerializeToString())
    outputs = job.names()[1]
    for rows in _rows(job, width):
        made = numpy.asarray(booster.predict(rows.astype("float64")))
        if len(outputs) == 1:
            job.sample([rows], [made.reshape(len(rows), -1)])
            continue
        chances = made if made.ndim == 2 else numpy.stack([1 - made, made], axis=1)
        job.sample([rows], [chances.argmax(axis=1).astype("int64"), chances])


def _catboost(job: Job) -> None:
    job.need("catboost")
    import catboost

    job.framework = job.converter = f"catboost {catboost.__version__}"
    model = catboost.CatBoost()
    model.load_model(str(job.source))
    if model.get_cat_feature_indices():
        raise job.Refused(
            f"{job.source.name} has categorical features, which CatBoost does not export to ONNX; train it on numbers "
            "(one-hot or ordinal) instead"
        )
    model.save_model(str(job.target), format="onnx")
    _plain_map(job)
    width = len(model.feature_names_)
    classes = list(getattr(model, "classes_", []))
    for rows in _rows(job, width):
        if classes:
            labels = model.predict(rows, prediction_type="Class").reshape(-1)
            job.sample([rows], [labels, model.predict(rows, prediction_type="Probability")])
        else:
            job.sample([rows], [model.predict(rows).reshape(-1, 1)])


def _plain_map(job: Job) -> None:
    """CatBoost ends a classifier with a ZipMap, which no other tool takes: hand out the tensor before it."""
    import onnx

    proto = onnx.load(str(job.target))
    for node in [n for n in proto.graph.node if n.op_type == "ZipMap"]:
        proto.graph.node.remove(node)
        for output in proto.graph.output:
            if output.name == node.output[0]:
                output.CopyFrom(onnx.helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, [None, None]))
    job.target.write_bytes(proto.SerializeToString())
