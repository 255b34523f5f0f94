"""EfficientNet-Lite0 pruned by Torch-Pruning (magnitude, global, no fine-tuning), for tools/bench/pruning.py.

    python torch_pruning_rival.py FOLDER-WITH-weights.pth SHARE-OF-MACS-LEFT OUTPUT.onnx

In an interpreter with torch, and with ``pip install torch-pruning``. Prints the share that is really left.
"""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-call"
# (torch is not in the environment that the project is checked in)

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch_pruning

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "realdata"))

from efficientnet_export import OPSET, SIDE, load, network


def main() -> None:
    """Prune in a hundred small steps until at most the share is left."""
    folder, share, target = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = network()
    load(model, torch.load(folder / "weights.pth", map_location="cpu", weights_only=True))
    image = torch.zeros(1, 3, SIDE, SIDE)
    count = torch_pruning.utils.count_ops_and_params
    start, _ = count(model, image)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        image,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.9,
        iterative_steps=100,
        ignored_layers=[layer for layer in model if isinstance(layer, torch.nn.Linear)],
        round_to=8,
    )
    left = start
    while left > share * start:
        pruner.step()
        left, _ = count(model, image)
    torch.onnx.export(
        model,
        (image,),
        target,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,
    )
    print(f"{left / start:.3f}")


if __name__ == "__main__":
    main()
