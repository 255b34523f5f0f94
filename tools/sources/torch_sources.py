"""Digits in PyTorch, trained here: a small net (net.pt2, net.ts, net.py:make), ResNet-18, a small ViT and
a small BERT of transformers. theirs.json: what torch.quantization.quantize_dynamic makes of the ResNet and of BERT.

python torch_sources.py FOLDER        in an environment with torch and transformers; FOLDER holds train.npz
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SOURCE = '''"""A small convolutional net for 8 x 8 digits."""

from pathlib import Path

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )

    def forward(self, image):
        return self.body(image)


def make():
    net = Net()
    net.load_state_dict(torch.load(Path(__file__).with_name("state.pt"), weights_only=True))
    return net
'''


RESNET = '''"""ResNet-18 (He et al., 2015) for 32 x 32 pictures of ten kinds; parts named as torchvision's."""

from pathlib import Path

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.downsample = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        short = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + short)


class ResNet18(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        layers = [nn.Sequential(Block(a, b, stride), Block(b, b, 1)) for a, b, stride in sizes]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def make():
    net = ResNet18(10)
    net.load_state_dict(torch.load(Path(__file__).with_name("resnet.pt"), weights_only=True))
    return net
'''


def train(
    net: Any, images: Any, labels: Any, logits: Any, rounds: int = 60, rate: float = 3e-3, rows: int = 300
) -> None:
    """Adam, ``rows`` at a time."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for _ in range(rounds):
        for some in torch.randperm(len(labels)).split(rows):
            given = {k: v[some] for k, v in images.items()} if isinstance(images, dict) else images[some]
            optimizer.zero_grad()
            made = logits(net(**given) if isinstance(given, dict) else net(given))
            torch.nn.functional.cross_entropy(made, labels[some]).backward()
            optimizer.step()
    net.eval()


def main(folder: Path) -> None:
    """Write the sources."""
    torch.manual_seed(0)
    data = np.load(folder / "train.npz")
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    (folder / "net.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    import net as module

    model = module.Net()
    train(model, images, labels, lambda made: made)
    torch.save(model.state_dict(), folder / "state.pt")
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},)), str(folder / "net.pt2"))
    torch.jit.trace(model, images[:1]).save(str(folder / "net.ts"))
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    vit = transformers.ViTForImageClassification(config)
    train(vit, images, labels, lambda made: made.logits, rounds=200)
    vit.save_pretrained(folder / "vit")
    theirs = {"resnet": resnet(folder, labels), "bert": bert(folder, labels)}
    (folder / "theirs.json").write_text(json.dumps(theirs))


def resnet(folder: Path, labels: Any) -> dict[str, float]:
    """Train and save ResNet-18."""
    (folder / "resnet.py").write_text(RESNET)
    import resnet as module

    model = module.ResNet18(10)
    images = torch.from_numpy(np.load(folder / "train_rgb.npz")["x"])
    train(model, images, labels, lambda made: made, rounds=6, rate=1e-3, rows=25)
    torch.save(model.state_dict(), folder / "resnet.pt")
    test = np.load(folder / "test_rgb.npz")
    return dynamic(model, lambda net: net(torch.from_numpy(test["x"])), test["label"])


def bert(folder: Path, labels: Any) -> dict[str, float]:
    """Train and save a small BERT that reads digits as 16 words of 16."""
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=32, num_labels=10,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    given = {k: torch.from_numpy(v) for k, v in np.load(folder / "train_tokens.npz").items() if k != "label"}
    train(model, given, labels, lambda made: made.logits, rounds=25, rate=1e-3, rows=25)
    model.save_pretrained(folder / "bert")
    test = dict(np.load(folder / "test_tokens.npz"))
    right = test.pop("label")
    return dynamic(model, lambda net: net(**{k: torch.from_numpy(v) for k, v in test.items()}).logits, right)


def dynamic(model: Any, run: Any, labels: Any) -> dict[str, float]:
    """Accuracy and bytes of a model, and of what PyTorch's own dynamic quantization makes of it."""
    warnings.simplefilter("ignore")  # that it is deprecated
    model.eval()
    smaller = torch.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found: dict[str, float] = {}
    for name, net in (("float", model), ("theirs", smaller)):
        stream = io.BytesIO()
        torch.save(net.state_dict(), stream)
        with torch.no_grad():
            found[f"{name}_accuracy"] = float((run(net).argmax(1).numpy() == labels).mean())
        found[f"{name}_bytes"] = stream.tell()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
