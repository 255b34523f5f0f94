"""A digits net in JAX, trained here: fn.py:net with its weights in fn.npz; and what jax.export writes (refused).

python jax_sources.py FOLDER          in an environment with jax; FOLDER holds train.npz
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

SOURCE = '''"""Two dense layers on 8 x 8 digits."""

from pathlib import Path

import jax
import numpy as np

W = dict(np.load(Path(__file__).with_name("fn.npz")))


def net(x):
    return jax.nn.relu(x @ W["a"] + W["b"]) @ W["c"] + W["d"]
'''


def main(folder: Path) -> None:
    """Write the sources."""
    data = np.load(folder / "train.npz")
    images, labels = data["image"].reshape(len(data["image"]), -1), data["label"]
    rng = np.random.default_rng(0)
    sizes = {"a": (64, 64), "b": (64,), "c": (64, 10), "d": (10,)}
    weights = {k: jnp.asarray(rng.standard_normal(s) * 0.1, jnp.float32) for k, s in sizes.items()}

    def loss(w: Any) -> Any:
        made = jax.nn.relu(images @ w["a"] + w["b"]) @ w["c"] + w["d"]
        return -jax.nn.log_softmax(made)[np.arange(len(labels)), labels].mean()

    step = jax.jit(lambda w: jax.tree.map(lambda p, g: p - 0.5 * g, w, jax.grad(loss)(w)))
    for _ in range(400):
        weights = step(weights)
    np.savez(folder / "fn.npz", **{k: np.asarray(v) for k, v in weights.items()})
    (folder / "fn.py").write_text(SOURCE)
    made = jax.export.export(jax.jit(lambda x: jax.nn.relu(x @ weights["a"])))(jax.ShapeDtypeStruct((1, 64), "float32"))
    (folder / "net.jaxexport").write_bytes(made.serialize())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
