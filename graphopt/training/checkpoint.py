"""A training that was interrupted goes on where it was: variables, moments, best values and the random numbers."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import InputError
from graphopt.storage import write_bytes

if TYPE_CHECKING:
    from graphopt.training.loop import Trained
    from graphopt.training.optimizers import Optimizer

_NUMBERS = ("before", "best", "best_step", "steps", "seconds", "seconds_per_step", "skipped", "losses")


@dataclass
class Checkpoint:
    """``path``: where it is written after each look at held-out samples (''; nowhere); ``resume``: what to go on from;
    ``mark``: of student, teacher, data and options, which must be the same."""

    path: str
    resume: str
    mark: str

    def write(self, state: Trained, optimizer: Optimizer, rng: np.random.Generator) -> None:
        """Replace the file, whole or not at all."""
        if not self.path:
            return
        arrays: dict[str, Any] = {f"value/{v.name}": v.value for v in optimizer.variables}
        arrays |= {f"best/{name}": value for name, value in state.values.items()}
        arrays |= {f"moment/{name}": value for name, value in optimizer.moments.items()}
        about = {name: getattr(state, name) for name in _NUMBERS}
        about |= {"mark": self.mark, "count": optimizer.count, "rng": rng.bit_generator.state, "sizes": optimizer.sizes}
        stream = io.BytesIO()
        np.savez(stream, about=np.asarray(json.dumps(about)), **arrays)
        write_bytes(self.path, stream.getvalue())

    def read(self, optimizer: Optimizer, rng: np.random.Generator) -> Trained | None:
        """The state in ``resume``, put into ``optimizer`` and ``rng``; None: there is nothing to resume.

        Raises:
            InputError: no such file, no checkpoint, or of another training.
        """
        from graphopt.training.loop import Trained

        if not self.resume:
            return None
        if not Path(self.resume).is_file():
            raise InputError(f"no checkpoint {self.resume}; leave --resume out to start from the student")
        try:
            with np.load(self.resume, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            about = json.loads(str(arrays.pop("about")))
            mark = about["mark"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{self.resume} is no checkpoint of graphopt finetune; leave --resume out") from error
        if mark != self.mark:
            raise InputError(
                f"the checkpoint {self.resume} is of another training (other models, data or options); "
                "give what it was made with, or leave --resume out"
            )
        for variable in optimizer.variables:
            variable.value = arrays[f"value/{variable.name}"]
        optimizer.moments = {n.removeprefix("moment/"): a for n, a in arrays.items() if n.startswith("moment/")}
        optimizer.count, optimizer.sizes = about["count"], about["sizes"]
        rng.bit_generator.state = about["rng"]
        best = {v.name: arrays[f"best/{v.name}"] for v in optimizer.variables}
        numbers = {name: about[name] for name in _NUMBERS}
        return Trained(values=best, **{**numbers, "losses": [tuple(item) for item in numbers["losses"]]})
