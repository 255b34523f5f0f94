"""The digits net in Keras, trained here: net.keras, saved/ (SavedModel), net.tflite, int8.tflite; and gelu.keras.

python tensorflow_sources.py FOLDER   in an environment with tensorflow; FOLDER holds train.npz
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf


def net(images: Any, labels: Any, activation: str) -> Any:
    """A trained net for 8 x 8 images, channels last."""
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            tf.keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(16, 3, padding="same", activation=activation),
            layers.BatchNormalization(),
            layers.Conv2D(32, 3, strides=2, padding="same", activation=activation),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.Adam(3e-3), loss)
    model.fit(images, labels, epochs=15, verbose=0)
    return model


def main(folder: Path) -> None:
    """Write the sources."""
    tf.keras.utils.set_random_seed(0)
    data = np.load(folder / "train.npz")
    images, labels = data["image"].transpose(0, 2, 3, 1), data["label"]
    model = net(images, labels, "relu")
    model.save(folder / "net.keras")
    model.export(str(folder / "saved"), verbose=False)
    (folder / "net.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]

    def samples() -> Iterator[list[Any]]:
        for image in images[:64]:
            yield [image[None]]

    converter.representative_dataset = samples
    (folder / "int8.tflite").write_bytes(converter.convert())
    net(images, labels, "gelu").save(folder / "gelu.keras")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
