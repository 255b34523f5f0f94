"""What a pass is, and what it may ask for. The engine knows nothing else about any concrete pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from graphopt.data import Dataset
    from graphopt.gram import Seen
    from graphopt.linear import Form
    from graphopt.statistics import Statistics

Contract = Literal["exact", "approximate"]

VERIFY = ("end", "each", "off")
"""When exact passes are compared with the original: once after a run of them, after every one, never."""


@dataclass(frozen=True)
class Change:
    """One rewrite that was made. ``site`` identifies it between runs of the pass on the same model."""

    action: str  # fold, fuse, eliminate, insert, quantize, ...
    site: str  # usually the node's name
    detail: str = ""


@dataclass(frozen=True)
class Skip:
    """One place where the pass might have acted and did not, and why."""

    site: str
    reason: str


@dataclass
class PassResult:
    """What a pass did. ``metrics`` are numbers worth printing; keys are snake_case."""

    changes: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        return bool(self.changes)


class Progress(Protocol):
    """Told how far a long step has come; shows it where a person is watching."""

    def __call__(self, done: int, total: int | None, what: str) -> None: ...


def _silent(done: int, total: int | None, what: str) -> None:
    del done, total, what


@dataclass
class Context:
    """What the manager offers a pass. The model itself is the pass's to edit; everything here is to be read."""

    original: ir.Model
    """The model as it came, with the interface asked for (see :attr:`Pass.narrows`)."""
    data: Dataset | None = None
    eval_data: Dataset | None = None
    target: str = "ort-cpu"
    this_cpu: bool = False
    seed: int = 0
    threads: int | None = None
    scratch: Path | None = None
    progress: Progress = _silent
    external_roots: tuple[Path, ...] = ()
    disabled: Collection[tuple[str, str]] = frozenset()
    """(pass name, site) pairs that a failed verification has ruled out; see :meth:`allows`."""
    channel_means: Callable[[ir.Model, Mapping[str, int]], dict[str, NDArray[np.float64]]] | None = None
    """Set by the pipeline: means per channel on calibration data, by value name and channel axis."""
    layer_inputs: Callable[[ir.Model, Sequence[Form]], dict[Form, Seen]] | None = None
    """Set by the pipeline: second moments of what layers read, and held-out inputs; forms it cannot tell are absent."""
    layer_rows: (
        Callable[
            [ir.Model, Sequence[Form], Callable[[Form, int], int], bool], Iterator[tuple[Form, NDArray[np.float32]]]
        ]
        | None
    ) = None
    """Set by the pipeline: (model, forms, rows per sample of a form given how many samples, whether held-out ones) ->
    each form with its inputs, sample by sample in the order of the data; of the same rows whatever the weights are."""
    held_out: Callable[[ir.Model], Iterator[dict[str, NDArray[Any]]]] | None = None
    """Set by the pipeline: the calibration samples that ``layer_inputs`` and ``layer_rows`` hold back."""
    fused_readers: Callable[[ir.Model], Mapping[str, int]] | None = None
    """Set by the pipeline: how many nodes read each value once the runtime has fused what it fuses; empty where it does
    not load the model."""
    collect: Callable[[ir.Model, Sequence[str], bool], Statistics] | None = None
    """Set by the manager: one statistics sweep, cached for the run."""

    def allows(self, pass_name: str, site: str) -> bool:
        """Whether the pass may make the rewrite ``site``. A pass that asks can be reverted rewrite by rewrite."""
        return (pass_name, site) not in self.disabled

    def statistics(self, model: ir.Model, names: Sequence[str], *, histograms: bool) -> Statistics:
        """Statistics of ``names`` in ``model`` over the calibration data.

        Raises:
            PreconditionError: there is no calibration data.
        """
        from graphopt.errors import PreconditionError

        if self.data is None or self.collect is None:
            raise PreconditionError(
                "this pass needs calibration data and there is none; give --data FILE (real samples), "
                "or spell out --data random"
            )
        return self.collect(model, names, histograms)


class Pass:
    """Base of every pass: a frozen dataclass whose fields are its options.

    Subclasses set ``name`` (kebab-case) and ``contract``, and implement :meth:`run`.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    narrows: ClassVar[bool] = False
    """Whether it takes a freedom from the caller, who asked for that: fewer inputs, or inputs of fewer shapes. Its
    outputs are the same wherever the result takes the input; where it cannot be done, that is an error."""

    def check(self, model: ir.Model) -> None:
        """Raise PreconditionError, naming node and remedy, if the pass cannot work on this graph."""
        del model

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Edit ``model`` in place and say what was done. No printing, no unseeded randomness."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as a recipe writes them (dashes for underscores)."""
        found: dict[str, Any] = {}
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            if value != _default(option):
                found[option.name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
        return found

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options().items())
        return f"{self.name}({options})" if options else self.name


def _default(option: dataclasses.Field[Any]) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


@dataclass(frozen=True)
class Repeat:
    """Run ``passes`` until none changes anything, at most ``times`` times."""

    passes: tuple[Pass, ...]
    times: int = 4

    def __post_init__(self) -> None:
        if not self.passes or self.times < 1:
            raise ValueError("a Repeat needs at least one pass and one time")


Pipeline = Sequence[Pass | Repeat]


def flatten(pipeline: Pipeline) -> list[Pass]:
    """The passes of a pipeline, each once, in order."""
    found: list[Pass] = []
    for step in pipeline:
        found.extend(step.passes if isinstance(step, Repeat) else (step,))
    return found


@dataclass
class Gates:
    """What the result must keep to; None: not asked. ``max_drop`` ends in ``%`` when it is relative."""

    max_drop: str | None = None
    min_sqnr: float | None = None  # dB, worst output
    min_speedup: float | None = None  # float time / new time, the lower bound of the paired ratio
    max_size: str | None = None  # bytes, "25MB", or a ratio such as "0.3"
    certify: bool = False

    def asked(self) -> Mapping[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None and v is not False}
