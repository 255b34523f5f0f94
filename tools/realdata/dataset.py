"""What a data builder returns, how it is stored, and the float session some builders need."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# The earliest date that a zip member can carry. A fixed one keeps the archives byte-identical.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class DataError(Exception):
    """A builder cannot make its data here; the message is one line that says what is missing."""


@dataclass(frozen=True)
class DataSet:
    """Stacked arrays (leading axis = samples) or `<key>/<index>` members, for both purposes."""

    calibration: Arrays
    evaluation: Arrays

    def counts(self) -> tuple[int, int]:
        """Number of calibration and evaluation samples."""
        return sample_count(self.calibration), sample_count(self.evaluation)


def sample_count(arrays: Arrays) -> int:
    """Number of samples in a mapping of stacked arrays and indexed members."""
    stacked = {len(array) for key, array in arrays.items() if "/" not in key}
    indexed: dict[str, int] = {}
    for key in arrays:
        if "/" in key:
            name = key.rsplit("/", 1)[0]
            indexed[name] = indexed.get(name, 0) + 1
    found = stacked | set(indexed.values())
    if len(found) != 1:
        raise DataError(f"arrays disagree about the number of samples: {sorted(found)}")
    return found.pop()


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write an npz whose bytes depend on nothing but the arrays.

    `numpy.savez` stamps the members with the present time. Members are stored without
    compression, since the bytes that deflate gives differ between zlib builds.
    """
    temporary = path.with_name(path.name + ".part")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(arrays):
            buffer = io.BytesIO()
            # ascontiguousarray would turn a scalar into a vector, so asarray with an order.
            np.lib.format.write_array(buffer, np.asarray(arrays[key], order="C"), allow_pickle=False)
            info = zipfile.ZipInfo(f"{key}.npy", date_time=_ZIP_EPOCH)
            info.external_attr = 0o644 << 16
            archive.writestr(info, buffer.getvalue())
    temporary.replace(path)


class FloatModel:
    """The float model in onnxruntime on one thread, so that its results do not depend on the cores."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
        self.input_names: list[str] = [feed.name for feed in self._session.get_inputs()]
        self.output_names: list[str] = [output.name for output in self._session.get_outputs()]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs by name."""
        return dict(zip(self.output_names, self._session.run(None, feeds), strict=True))
