"""scikit-learn: estimators and pipelines saved by skops, or by pickle and joblib where that was allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.conversion.workers.worker import Job


def convert(job: Job) -> None:
    """Export with skl2onnx; run ``predict`` and ``predict_proba`` (or ``transform``)."""
    job.need("sklearn", "skl2onnx", *(("skops",) if job.kind == "skops" else ()))
    import skl2onnx
    import sklearn

    job.framework = f"scikit-learn {sklearn.__version__}"
    job.converter = f"skl2onnx {skl2onnx.__version__}"
    model = _loaded(job)
    if not hasattr(model, "get_params"):
        raise job.Refused(
            f"{job.source.name} holds a {type(model).__module__}.{type(model).__name__}, which is no scikit-learn "
            "estimator; save the fitted estimator or pipeline itself"
        )
    columns = _columns(job, model)
    _registered(model)
    _plain_numbers()
    proto = skl2onnx.to_onnx(
        model,
        initial_types=[(name, _type(dtype, width)) for name, dtype, width in columns],
        target_opset={"": job.opset, "ai.onnx.ml": 3},
        options=_options(model),
    )
    job.target.write_bytes(proto.SerializeToString())
    names = job.names()[1]
    for rows in (*[1] * (job.count - 1), 8):
        feeds = _rows(job, columns, rows)
        job.sample([feeds[name] for name in job.names()[0]], _outputs(model, feeds, columns, names))


def _loaded(job: Job) -> Any:
    if job.kind == "pickle":
        import joblib

        return joblib.load(job.source)  # the user said --allow-pickle
    import skops.io

    unknown = skops.io.get_untrusted_types(file=str(job.source))
    # skops itself trusts scikit-learn and numpy; these are boosters whose loading runs no code of the file's.
    trusted = [name for name in unknown if name.split(".")[0] in ("xgboost", "lightgbm", "sklearn", "numpy")]
    foreign = sorted(set(unknown) - set(trusted))
    if foreign:
        raise job.Refused(
            f"{job.source.name} needs types that are not scikit-learn's ({', '.join(foreign[:3])}); they may run code, "
            "and skl2onnx would not know them: save a pipeline of scikit-learn's own steps"
        )
    return skops.io.load(str(job.source), trusted=trusted)


def _options(model: Any) -> dict[Any, Any]:
    """Tensors instead of maps, and a locale that every machine has."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    found: dict[Any, Any] = {CountVectorizer: {"locale": "C"}, TfidfVectorizer: {"locale": "C"}}
    if hasattr(model, "classes_"):
        found[id(model)] = (
            {"zipmap": False} if hasattr(model, "predict_proba") else {"zipmap": False, "raw_scores": True}
        )
    return found


def _registered(model: Any) -> None:
    """Teach skl2onnx the boosters that stand in the pipeline."""
    import sys

    if "lightgbm" in sys.modules or "xgboost" in sys.modules:
        from skl2onnx import update_registered_converter
        from skl2onnx.common import shape_calculator as shapes

        calculators = (
            shapes.calculate_linear_classifier_output_shapes,
            shapes.calculate_linear_regressor_output_shapes,
        )
        if "xgboost" in sys.modules:
            from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
            from xgboost import XGBClassifier, XGBRegressor

            for kind, calculator in zip((XGBClassifier, XGBRegressor), calculators, strict=True):
                options = {"zipmap": [True, False, "columns"], "nocl": [True, False]} if "Cl" in kind.__name__ else {}
                update_registered_converter(kind, f"XGB{kind.__name__}", calculator, convert_xgboost, options=options)
        if "lightgbm" in sys.modules:
            from lightgbm import LGBMClassifier, LGBMRegressor
            from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm

            for kind, calculator in zip((LGBMClassifier, LGBMRegressor), calculators, strict=True):
                options = {"zipmap": [True, False, "columns"], "nocl": [True, False]} if "Cl" in kind.__name__ else {}
                update_registered_converter(kind, f"LGBM{kind.__name__}", calculator, convert_lightgbm, options=options)


def _plain_numbers() -> None:
    """HistGradientBoosting keeps numpy's numbers and booleans where attributes are written, which onnx refuses."""
    from onnx import helper

    original = helper.make_attribute

    def plain(key: str, value: Any, *more: Any, **options: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (list, tuple)):
            value = [item.item() if hasattr(item, "item") else item for item in value]
            value = [int(item) if isinstance(item, bool) else item for item in value]
        return original(key, value, *more, **options)

    helper.make_attribute = plain


def _columns(job: Job, model: Any) -> list[tuple[str, str, int]]:
    """(input name, dtype, width): one matrix; or one column each where the model was fitted on a table with names."""
    if job.data is not None:
        return [(name, _kind(array), 1 if array.ndim == 1 else array.shape[1]) for name, array in job.data.items()]
    if job.shapes:
        return [(s["name"] or f"X{k or ''}", s["dtype"], int(s["shape"][-1])) for k, s in enumerate(job.shapes)]
    width = getattr(model, "n_features_in_", None)
    if _by_column(model):
        names = ", ".join(map(str, list(getattr(model, "feature_names_in_", ["a", "b"]))[:6]))
        raise job.Refused(
            f"{job.source.name} picks columns by name ({names}, ...), and does not say of which type they are; give "
            "--data rows.npz with one array per column"
        )
    if width is None:
        raise job.Refused(
            f"{job.source.name} does not say what it takes (text?); give --data rows.npz with some inputs as they are"
        )
    return [("X", "float32", int(width))]


def _by_column(model: Any) -> bool:
    """Whether a ColumnTransformer stands in it that picks columns by name."""
    steps = [model, *(step for _, step in getattr(model, "steps", []))]
    picked = [columns for step in steps for _, _, columns in getattr(step, "transformers_", [])]
    return any(
        isinstance(c, str) or (isinstance(c, (list, tuple)) and any(isinstance(n, str) for n in c)) for c in picked
    )


def _kind(array: Any) -> str:
    return "string" if array.dtype.kind in "US" else "int64" if array.dtype.kind in "iu" else "float32"


def _type(dtype: str, width: int) -> Any:
    from skl2onnx.common import data_types as types

    known = {
        "string": types.StringTensorType, "int64": types.Int64TensorType, "float32": types.FloatTensorType,
        "float64": types.DoubleTensorType, "bool": types.BooleanTensorType,
    }  # fmt: skip
    return known[dtype]([None, width])


def _rows(job: Job, columns: list[tuple[str, str, int]], rows: int) -> dict[str, Any]:
    import numpy

    feeds: dict[str, Any] = {}
    given = job.data
    picked = None if given is None else job.rng.integers(0, len(next(iter(given.values()))), rows)
    for name, dtype, width in columns:
        if given is not None:
            array = given[name][picked].reshape(rows, width)
            feeds[name] = array.astype(str if dtype == "string" else dtype)
        else:
            feeds[name] = job.drawn(numpy.dtype(dtype), (rows, width), high=8)
    return feeds


def _outputs(model: Any, feeds: dict[str, Any], columns: list[tuple[str, str, int]], names: list[str]) -> list[Any]:
    """What scikit-learn makes of it, in the order of the converted model's outputs."""
    import numpy
    from sklearn.base import is_regressor

    # The same numbers in double: some estimators fitted in double refuse floats.
    feeds = {name: a.astype("float64") if a.dtype == numpy.float32 else a for name, a in feeds.items()}
    x: Any
    if len(columns) == 1:
        x = next(iter(feeds.values()))
        first = columns[0]
        if first[1] == "string" and first[2] == 1:
            x = x.reshape(-1)  # text vectorizers take a list of texts
    else:
        import pandas

        x = pandas.DataFrame({name: array.reshape(len(array)) for name, array in feeds.items()})
    if not hasattr(model, "predict"):
        made = model.transform(x)
        return [made.toarray() if hasattr(made, "toarray") else made]
    predicted = numpy.asarray(model.predict(x))
    if predicted.ndim == 1 and is_regressor(model):
        predicted = predicted.reshape(-1, 1)  # in ONNX a regressor's values stand in a column
    found = [predicted]
    if len(names) > 1 and hasattr(model, "predict_proba"):
        found.append(model.predict_proba(x))
    elif len(names) > 1 and hasattr(model, "decision_function"):
        scores = model.decision_function(x)
        found.append(scores if scores.ndim == 2 else scores.reshape(-1, 1))
    elif len(names) > 1 and hasattr(model, "transform"):
        found.append(model.transform(x))
    return found
