"""Classifiers of digits in scikit-learn, XGBoost, LightGBM and CatBoost.

python sklearn_sources.py FOLDER      in an environment with all of these; FOLDER holds train_flat.npz
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import skops.io
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def main(folder: Path) -> None:
    """Write the sources."""
    estimators(folder)
    boosters(folder)


def _rows(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    data = np.load(folder / "train_flat.npz")
    return data["X"], data["label"]


def estimators(folder: Path) -> None:
    """scikit-learn's own."""
    images, labels = _rows(folder)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(images, labels)
    skops.io.dump(linear, folder / "linear.skops")
    (folder / "linear.pkl").write_bytes(pickle.dumps(linear))
    mlp = MLPClassifier((64,), max_iter=300, random_state=0, learning_rate_init=0.01).fit(images, labels)
    skops.io.dump(mlp, folder / "mlp.skops")
    skops.io.dump(HistGradientBoostingClassifier(max_iter=20).fit(images, labels), folder / "hist.skops")


def boosters(folder: Path) -> None:
    """Those of other packages."""
    import catboost
    import lightgbm
    import xgboost

    images, labels = _rows(folder)
    xgboost.XGBClassifier(n_estimators=20, max_depth=4).fit(images, labels).save_model(folder / "trees.ubj")
    lightgbm.LGBMClassifier(n_estimators=20, verbose=-1).fit(images, labels).booster_.save_model(folder / "trees.txt")
    boosted = catboost.CatBoostClassifier(iterations=40, verbose=0, allow_writing_files=False)
    boosted.fit(images, labels).save_model(str(folder / "trees.cbm"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
