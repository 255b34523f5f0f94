"""The digits net in PyTorch, trained here: net.pt2, net.ts, net.py:make, and a small ViT of transformers.

python torch_sources.py FOLDER        in an environment with torch and transformers; FOLDER holds train.npz
"""

from __future__ import annotations

import sys
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


def train(net: Any, images: Any, labels: Any, logits: Any, rounds: int = 60) -> None:
    """Full-batch Adam."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(rounds):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(net(images)), labels).backward()
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
