"""Export EfficientNet-Lite0 to ONNX. Run by tools/fetch_models.py in an interpreter with torch.

python efficientnet_export.py FOLDER-WITH-weights.pth OUTPUT.onnx
"""

# mypy: allow-subclassing-any
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-call"
# (torch is not in the environment that the project is checked in)

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

# (repeats, kernel, stride, expansion, channels in, channels out)
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
SIDE, CLASSES, OPSET = 224, 1000, 17


def same_convolution(size: int, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> Any:
    """A convolution with TensorFlow's SAME padding, which is uneven where the stride is 2."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    even = before == after
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=before if even else 0, groups=groups, bias=False)
    return convolution if even else nn.Sequential(nn.ZeroPad2d((before, after, before, after)), convolution)


def norm(channels: int) -> Any:
    """The batch norm with the weights' epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual block: no squeeze and excitation, ReLU6, as the lite variants have it."""

    def __init__(self, size: int, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, wide, 1, bias=False), norm(wide), nn.ReLU6()]
        layers += [same_convolution(size, wide, wide, kernel, stride, groups=wide), norm(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, outputs, 1, bias=False), norm(outputs)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        """Output of the block."""
        y = self.layers(x)
        return x + y if self.residual else y


def network() -> Any:
    """EfficientNet-Lite0, its parameters in the order of the weights' file."""
    layers: list[Any] = [same_convolution(SIDE, 3, 32, 3, 2), norm(32), nn.ReLU6()]
    size = SIDE // 2
    for repeats, kernel, stride, expansion, inputs, outputs in STAGES:
        for index in range(repeats):
            first = index == 0
            layers.append(Block(size, kernel, stride if first else 1, expansion, inputs if first else outputs, outputs))
            size = -(-size // stride) if first else size
    layers += [nn.Conv2d(320, 1280, 1, bias=False), norm(1280), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES)]
    return nn.Sequential(*layers).eval()


def load(model: Any, weights: dict[str, Any]) -> None:
    """Fill the model by order: the file names its layers otherwise but lists them as they run.

    The shapes are compared one by one, so a wrong order cannot go unseen.
    """
    own = model.state_dict()
    if len(own) != len(weights):
        raise SystemExit(f"the weights hold {len(weights)} tensors, the network {len(own)}")
    filled = {}
    for (name, tensor), (source, value) in zip(own.items(), weights.items(), strict=True):
        if tensor.shape != value.shape or name.rsplit(".", 1)[1] != source.rsplit(".", 1)[1]:
            raise SystemExit(f"{source} {tuple(value.shape)} does not fit {name} {tuple(tensor.shape)}")
        filled[name] = value
    model.load_state_dict(filled)


def main() -> None:
    """Export with a dynamic batch; torch folds the batch norms into the convolutions."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    model = network()
    load(model, torch.load(folder / "weights.pth", map_location="cpu", weights_only=True))
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, SIDE, SIDE),),
        str(target),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,
    )


if __name__ == "__main__":
    main()
