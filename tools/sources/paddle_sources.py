"""The digits net in Paddle, trained here: paddle.json with paddle.pdiparams.

python paddle_sources.py FOLDER       in an environment with paddlepaddle; FOLDER holds train.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle


def main(folder: Path) -> None:
    """Write the sources."""
    paddle.seed(0)
    data = np.load(folder / "train.npz")
    images, labels = paddle.to_tensor(data["image"]), paddle.to_tensor(data["label"])
    nn = paddle.nn
    net = nn.Sequential(
        nn.Conv2D(1, 16, 3, padding=1), nn.BatchNorm2D(16), nn.ReLU(), nn.Conv2D(16, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = paddle.optimizer.Adam(3e-3, parameters=net.parameters())
    for _ in range(60):
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.clear_grad()
    net.eval()
    spec = paddle.static.InputSpec([None, 1, 8, 8], "float32", "input")
    paddle.jit.save(net, str(folder / "paddle"), input_spec=[spec])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
