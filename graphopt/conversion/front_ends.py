"""The front ends: which script converts what, what it needs, and how that is installed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FrontEnd:
    """One form of a model. ``script`` is a file in ``workers/``; ``extra`` graphopt's extra, ``packages`` what it
    stands for in another environment."""

    title: str
    script: str
    extra: str
    packages: str
    direction: str = "from"

    @property
    def road(self) -> str:
        """``from PyTorch module``, as messages say it."""
        return f"{self.direction} {self.title}"


_TORCH = "torch onnx onnxscript"
_TENSORFLOW = "tensorflow-cpu tf2onnx onnx"
_SKLEARN = "scikit-learn skl2onnx skops onnx"
_TREES = "onnxmltools skl2onnx packaging onnx"

FRONT_ENDS: dict[str, FrontEnd] = {
    "torch": FrontEnd("PyTorch module", "from_torch.py", "torch", _TORCH),
    "pt2": FrontEnd("PyTorch exported program", "from_torch.py", "torch", _TORCH),
    "torchscript": FrontEnd("TorchScript", "from_torch.py", "torch", "torch onnx"),
    "transformers": FrontEnd("transformers model", "from_transformers.py", "transformers", f"{_TORCH} transformers"),
    "skops": FrontEnd("scikit-learn (skops)", "from_sklearn.py", "sklearn", _SKLEARN),
    "pickle": FrontEnd("scikit-learn (pickle)", "from_sklearn.py", "sklearn", _SKLEARN),
    "xgboost": FrontEnd("XGBoost", "from_trees.py", "trees", f"xgboost-cpu {_TREES}"),
    "lightgbm": FrontEnd("LightGBM", "from_trees.py", "trees", f"lightgbm {_TREES}"),
    "catboost": FrontEnd("CatBoost", "from_trees.py", "catboost", "catboost onnx"),
    "tflite": FrontEnd("TensorFlow Lite", "from_tensorflow.py", "tensorflow", _TENSORFLOW),
    "savedmodel": FrontEnd("TensorFlow SavedModel", "from_tensorflow.py", "tensorflow", _TENSORFLOW),
    "graphdef": FrontEnd("TensorFlow frozen graph", "from_tensorflow.py", "tensorflow", _TENSORFLOW),
    "keras": FrontEnd("Keras", "from_tensorflow.py", "tensorflow", _TENSORFLOW),
    "jax": FrontEnd("JAX function", "from_jax.py", "jax", "jax jax2onnx onnx"),
    "paddle": FrontEnd("PaddlePaddle", "from_paddle.py", "paddle", "paddlepaddle paddle2onnx==2.0.1 onnx"),
}
"""kind (what ``--from`` takes) -> front end."""
