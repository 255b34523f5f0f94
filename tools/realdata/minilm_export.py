"""Export MiniLM-L6 to ONNX. Run by tools/fetch_models.py in an interpreter with transformers.

python minilm_export.py FOLDER-WITH-model.safetensors OUTPUT.onnx
"""

# mypy: allow-subclassing-any
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-call"
# (torch is not in the environment that the project is checked in)

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import BertModel

OPSET = 17
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SentenceEncoder(nn.Module):
    """The encoder and the mean over the tokens, as sentence-transformers configures this model."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        """[batch, 384] embeddings of unit length."""
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def main() -> None:
    """Export with dynamic batch and length."""
    folder, target = sys.argv[1], sys.argv[2]
    # Eager attention traces to plain MatMul and Softmax, what exported encoders commonly look like.
    encoder = BertModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
    model = SentenceEncoder(encoder).eval()
    example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in INPUTS)
    axes = {name: {0: "batch", 1: "length"} for name in INPUTS}
    torch.onnx.export(
        model,
        example,
        target,
        input_names=list(INPUTS),
        output_names=["embedding"],
        dynamic_axes=axes | {"embedding": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,
    )


if __name__ == "__main__":
    main()
