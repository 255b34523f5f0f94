"""``s3://`` for real: s3fs against a server that speaks the protocol (moto), in an environment of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import DEMO, python

from graphopt.model import load

pytestmark = pytest.mark.framework

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[Shell]:
    """Runs a command of that environment beside a server with an empty bucket ``bkt``."""
    interpreter = Path(python("s3"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    environment = {**os.environ, **told, "AWS_DEFAULT_REGION": "us-east-1", "PYTHONPATH": ""}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(interpreter), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    with subprocess.Popen(
        [str(interpreter.parent / "moto_server"), "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.2)
            made = run("-c", "import s3fs; s3fs.S3FileSystem().mkdir('bkt')")
            assert made.returncode == 0, made.stderr
            yield run
        finally:
            server.terminate()


def listed(s3: Shell) -> list[str]:
    return s3("-c", "import s3fs; print(*sorted(s3fs.S3FileSystem().find('bkt')))").stdout.split()


def test_from_bucket_to_bucket(s3: Shell, tmp_path: Path) -> None:
    put = f"import s3fs; f = s3fs.S3FileSystem(); f.put({str(DEMO)!r} + '/digits.onnx', 'bkt/in/digits.onnx'); "
    assert s3("-c", put + f"f.put({str(DEMO)!r} + '/evaluation.npz', 'bkt/in/data.npz')").returncode == 0
    words = (
        "--data",
        "s3://bkt/in/data.npz",
        "--metric",
        "accuracy",
        "--time",
        "0",
        "--allow-slower",
        "--samples",
        "80",
    )
    ran = s3("-m", "graphopt", "quantize", "s3://bkt/in/digits.onnx", "-o", "s3://bkt/out/int8.onnx", *words)
    assert ran.returncode == 0, ran.stderr
    assert listed(s3) == ["bkt/in/data.npz", "bkt/in/digits.onnx", "bkt/out/int8.onnx"]
    again = s3("-m", "graphopt", "compare", "s3://bkt/in/digits.onnx", "s3://bkt/out/int8.onnx", "--data", "random")
    assert again.returncode == 0, again.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_and_its_data_file_travel_together(s3: Shell, tmp_path: Path) -> None:
    make = (
        "import numpy as np, onnx; from onnx import helper as h, numpy_helper as n;"
        "w = n.from_array(np.eye(256, dtype='f'), 'w'); v = [h.make_tensor_value_info(k, 1, [1, 256]) for k in 'xy'];"
        "g = h.make_graph([h.make_node('Identity', ['x'], ['i']), h.make_node('MatMul', ['i', 'w'], ['y'])], 'g',"
        "v[:1], v[1:], [w]); m = h.make_model(g, ir_version=8, opset_imports=[h.make_opsetid('', 17)]);"
        "onnx.save(m, 'm.onnx', save_as_external_data=True, location='m.data', size_threshold=0);"
        "import s3fs; f = s3fs.S3FileSystem(); f.put('m.onnx', 'bkt/m.onnx'); f.put('m.data', 'bkt/m.data')"
    )
    assert s3("-c", make).returncode == 0
    ran = s3("-m", "graphopt", "optimize", "s3://bkt/m.onnx", "-o", "s3://bkt/o/m.onnx", "--time", "0")
    assert ran.returncode == 0, ran.stderr
    *before, data, model = sorted(listed(s3), key=lambda name: (name.count("/"), name.endswith(".onnx")))
    assert (before, model) == (["bkt/m.data", "bkt/m.onnx"], "bkt/o/m.onnx")
    assert data.startswith("bkt/o/m.onnx.")
    assert s3("-c", "import s3fs; s3fs.S3FileSystem().get('bkt/o/', 'back/', recursive=True)").returncode == 0
    (node,) = load(tmp_path / "back" / "m.onnx").graph
    assert node.op_type == "MatMul"
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), np.eye(256, dtype="f"))  # type: ignore[union-attr]


def test_what_is_not_there_is_one_line(s3: Shell) -> None:
    for address in ("s3://bkt/none.onnx", "s3://no-such-bucket/m.onnx"):
        ran = s3("-m", "graphopt", "inspect", address)
        assert (ran.returncode, ran.stderr) == (2, f"error: no such file: {address}; check the address\n")
