"""The digits net in Keras, trained here: net.keras, saved/ (SavedModel), net.tflite, int8.tflite; gelu.keras; and
MobileNetV2 (mobilenet.keras).

python tensorflow_sources.py FOLDER   in an environment with tensorflow; FOLDER holds train.npz
"""

from __future__ import annotations

import json
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
    mobilenet(folder)


def mobilenet(folder: Path) -> None:
    """Train and save MobileNetV2 of Keras' applications; theirs.json: what the TFLite converter's int8 makes of it."""
    train, calib, test = (np.load(folder / f"{name}_rgb_nhwc.npz") for name in ("train", "calib", "test"))
    model = tf.keras.applications.MobileNetV2(
        input_tensor=tf.keras.Input((32, 32, 3), name="image"),
        alpha=0.35,
        weights=None,
        classes=10,
        classifier_activation=None,
    )
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = 0.9  # of 0.999, which wants thousands of steps
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.Adam(1e-3), loss)
    model.fit(train["image"], train["label"], batch_size=20, epochs=32, verbose=0)
    model.save(folder / "mobilenet.keras")

    def samples() -> Iterator[list[Any]]:
        for image in calib["image"]:
            yield [image[None]]

    found: dict[str, float] = {}
    for name in ("float", "theirs"):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if name == "theirs":
            converter.optimizations, converter.representative_dataset = [tf.lite.Optimize.DEFAULT], samples
        made = converter.convert()
        found[f"{name}_bytes"], found[f"{name}_accuracy"] = len(made), accuracy(made, test)
    (folder / "theirs.json").write_text(json.dumps({"mobilenet": found}))


def accuracy(made: bytes, test: Any) -> float:
    """Of a TFLite file, in its own interpreter."""
    interpreter = tf.lite.Interpreter(model_content=made)
    interpreter.allocate_tensors()
    given, answer = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    hits = 0
    for image, label in zip(test["image"], test["label"], strict=True):
        interpreter.set_tensor(given, image[None])
        interpreter.invoke()
        hits += int(interpreter.get_tensor(answer).argmax() == label)
    return hits / len(test["label"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
