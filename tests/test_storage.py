"""Writing: the old file or the complete new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx
import pytest

from graphopt import storage
from graphopt.errors import GraphoptError, InputError, ModelError
from graphopt.model import fingerprint, load, to_proto
from graphopt.storage import save


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def one_line(caught: pytest.ExceptionInfo[GraphoptError]) -> None:
    assert str(caught.value).isprintable()
    assert ";" in str(caught.value)


def same(path: Path, proto: onnx.ModelProto) -> bool:
    return fingerprint(load(path)) == fingerprint(load(proto))


class TestInline:
    def test_round_trip_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "out.onnx"
        assert save(load(builders.mlp()), path) == [path]
        assert names(tmp_path) == {"out.onnx"}
        onnx.checker.check_model(onnx.load(path))
        assert same(path, builders.mlp())

    def test_odd_names(self, tmp_path: Path) -> None:
        for name in ("with space.onnx", "模型.onnx", "名" * 83 + ".onnx", ".hidden", "noext"):
            assert same(save(load(builders.mlp()), tmp_path / name)[0], builders.mlp())

    def test_same_bytes_twice(self, tmp_path: Path) -> None:
        for external in (False, True):
            first = save(load(builders.mlp()), tmp_path / "m.onnx", external=external)
            before = [p.read_bytes() for p in first]
            assert [
                p.read_bytes() for p in save(load(builders.mlp()), tmp_path / "m.onnx", external=external)
            ] == before

    def test_in_place(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(builders.mlp().SerializeToString())
        save(load(path), path)
        size = path.stat().st_size
        save(load(path), path)
        assert path.stat().st_size == size
        assert names(tmp_path) == {"m.onnx"}

    def test_stdout(self, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        with os.fdopen(os.dup(1), "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert save(load(builders.relu()), "-") == []
        assert len(onnx.ModelProto.FromString(capfdbinary.readouterr().out).graph.node) == 1

    def test_devices_are_written_to_not_replaced(self) -> None:
        save(load(builders.relu()), "/dev/null")
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
        with pytest.raises(InputError, match="No space left") as caught:
            save(load(builders.relu()), "/dev/full")
        one_line(caught)

    def test_symlink_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link.onnx").symlink_to("real/m.onnx")
        for _ in range(2):  # dangling first, then not
            save(load(builders.mlp()), tmp_path / "link.onnx")
            assert (tmp_path / "link.onnx").is_symlink()
            assert same(tmp_path / "real" / "m.onnx", builders.mlp())

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_umask(self, tmp_path: Path, umask: int, mode: int) -> None:
        before = os.umask(umask)
        try:
            written = save(load(builders.mlp()), tmp_path / "m.onnx", external=True)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(p.stat().st_mode) for p in written} == {mode}

    def test_mode_of_an_existing_file_stays(self, tmp_path: Path) -> None:
        path = save(load(builders.mlp()), tmp_path / "m.onnx")[0]
        path.chmod(0o640)
        save(load(builders.mlp(seed=1)), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


class TestDataFile:
    def test_named_by_its_hash_and_loadable_elsewhere(self, tmp_path: Path) -> None:
        path, data = save(load(builders.mlp()), tmp_path / "m.onnx", external=True)
        assert data.name.startswith("m.onnx.")
        assert data.suffix == ".data"
        assert path.stat().st_size < 1000
        assert same(path, builders.mlp())
        onnx.checker.check_model(str(path))
        assert np.array_equal(
            onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[1]),
            onnx.numpy_helper.to_array(builders.mlp().graph.initializer[1]),
        )

    def test_runs_in_onnxruntime(self, tmp_path: Path) -> None:
        import onnxruntime

        path, _ = save(load(builders.mlp()), tmp_path / "m.onnx", external=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert session.run(None, {"x": np.ones((1, 32), np.float32)})[0].shape == (1, 32)

    def test_tensor_notes_are_kept(self, tmp_path: Path) -> None:
        proto = builders.mlp()
        proto.graph.initializer[0].doc_string = "doc"
        proto.graph.initializer[0].metadata_props.add(key="a", value="b")
        path, _ = save(load(proto), tmp_path / "m.onnx", external=True)
        for tensor in (onnx.load(path).graph.initializer[0], to_proto(load(path)).graph.initializer[0]):
            assert (tensor.doc_string, len(tensor.metadata_props)) == ("doc", 1)

    def test_in_place_without_growth_or_orphans(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        save(load(builders.mlp()), path, external=True)
        before = names(tmp_path)
        for _ in range(2):
            model = load(path)
            save(model, path)  # it came with a data file: it keeps one
            assert names(tmp_path) == before
        assert same(path, builders.mlp())

    def test_old_data_of_ours_goes(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        save(load(builders.mlp(seed=0)), path, external=True)
        old = load(path)
        save(load(builders.mlp(seed=1)), path, external=True)
        assert len(names(tmp_path)) == 2
        assert fingerprint(old) == fingerprint(load(builders.mlp(seed=0)))  # what is mapped stays readable
        save(old, path, external=False)
        assert names(tmp_path) == {"m.onnx"}

    def test_foreign_data_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        onnx.save(builders.mlp(), path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
        before = (tmp_path / "m.onnx.data").read_bytes()
        save(load(path), path)
        assert (tmp_path / "m.onnx.data").read_bytes() == before
        assert same(path, builders.mlp())

    def test_foreign_data_stays_where_ours_goes(self, tmp_path: Path) -> None:
        path, ours = save(load(builders.mlp()), tmp_path / "m.onnx", external=True)
        foreign = tmp_path / "weights.bin"
        foreign.write_bytes(ours.read_bytes())
        mixed = onnx.load(path, load_external_data=False)
        entries = [e for t in mixed.graph.initializer for e in t.external_data if e.key == "location"]
        assert len(entries) > 1
        entries[0].value = foreign.name
        path.write_bytes(mixed.SerializeToString())
        save(load(builders.mlp(seed=1)), path, external=False)
        assert names(tmp_path) == {"m.onnx", "weights.bin"}

    def test_neighbours_of_one_stem_do_not_share(self, tmp_path: Path) -> None:
        first, second = tmp_path / "m.onnx", tmp_path / "m.opt"
        save(load(builders.mlp()), first, external=True)
        save(load(first), second)
        save(load(builders.mlp(seed=1)), second, external=True)
        assert same(first, builders.mlp())

    def test_nothing_large_enough_needs_no_data_file(self, tmp_path: Path) -> None:
        assert save(load(builders.external(tmp_path / "in")), tmp_path / "m.onnx") == [tmp_path / "m.onnx"]

    def test_too_large_for_one_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "INLINE_LIMIT", 5000)
        assert len(save(load(builders.mlp()), tmp_path / "m.onnx")) == 2
        monkeypatch.setattr("graphopt.model.PROTO_LIMIT", 5000)
        assert same(tmp_path / "m.onnx", builders.mlp())
        assert len(save(load(builders.mlp()), tmp_path / "n.onnx", external=True)) == 2
        with pytest.raises(ModelError, match="2 GB") as caught:
            save(load(builders.mlp()), tmp_path / "o.onnx", external=False)
        one_line(caught)
        assert not (tmp_path / "o.onnx").exists()

    def test_every_type_and_bodies(self, tmp_path: Path) -> None:
        proto = builders.conditional()
        big = builders.weight("big", np.arange(512))
        proto.graph.node[0].attribute[0].g.initializer.append(big)
        for name in ("BFLOAT16", "INT4", "FLOAT8E4M3FN"):
            kind = getattr(onnx.TensorProto, name)
            proto.graph.initializer.append(onnx.helper.make_tensor(name, kind, [4096], [1, 0, 1, 1] * 1024))
        proto.graph.initializer.append(onnx.helper.make_tensor("text", onnx.TensorProto.STRING, [500], [b"abc"] * 500))
        path, data = save(load(proto), tmp_path / "m.onnx", external=True)
        assert data.stat().st_size >= 2048 + 8192 + 2048 + 4096
        before = {name: v.const_value.tobytes() for name, v in load(proto).graph.initializers.items() if name != "text"}
        after = load(path).graph.initializers
        assert {name: after[name].const_value.tobytes() for name in before} == before


class TestBadTargets:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"does not exist; make it first: mkdir -p") as caught:
            save(load(builders.relu()), tmp_path / "no" / "m.onnx")
        one_line(caught)
        assert names(tmp_path) == set()

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder; name the output file"):
            save(load(builders.relu()), tmp_path)

    @pytest.mark.parametrize("name", ["nul\0.onnx", "x" * 300, "file/m.onnx"])
    def test_impossible_names(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(InputError) as caught:
            save(load(builders.relu()), f"{tmp_path}/{name}")
        one_line(caught)
        assert names(tmp_path) == {"file"}


class Fault:
    """Fails the n-th call of a function with an OSError."""

    def __init__(self, function: Any, nth: int, code: int) -> None:
        self.function, self.left, self.code = function, nth, code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("external", [False, True])
class TestFaults:
    """Whatever the system refuses: one line, the old model intact, nothing left lying about."""

    @pytest.mark.parametrize("nth", [1, 2, 3, 4])
    @pytest.mark.parametrize("call", ["open", "fsync", "fdopen", "replace"])
    def test_refused_calls(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, external: bool
    ) -> None:
        path = tmp_path / "m.onnx"
        save(load(builders.mlp()), path, external=external)
        before = names(tmp_path)
        new = load(builders.mlp(seed=1))
        owner = Path if call == "replace" else os
        fault = Fault(getattr(owner, call), nth, errno.EACCES)
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, (lambda *a, **k: fault(*a, **k)) if owner is Path else fault)
            try:
                save(new, path, external=external)
                failed = False
            except InputError as error:
                failed = True
                message = str(error)
        if failed:
            assert "Permission denied" in message
            assert "nothing was changed" in message
            assert names(tmp_path) == before
            assert same(path, builders.mlp())
        else:  # the call was not reached, or syncing the folder failed after the commit, which is no failure
            assert same(path, builders.mlp(seed=1))
            assert len(names(tmp_path)) == len(before)

    def test_every_failure_before_the_commit_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
    ) -> None:
        monkeypatch.setattr(os, "fsync", Fault(os.fsync, 1, errno.EIO))
        with pytest.raises(InputError, match="Input/output error") as caught:
            save(load(builders.mlp()), tmp_path / "m.onnx", external=external)
        one_line(caught)
        assert names(tmp_path) == set()

    def test_full_disk(self, tmp_path: Path, external: bool) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False, capture_output=True
            ).returncode
        )
        if not mounted:
            pytest.skip("needs a small file system: no right to mount one")
        try:
            path = disk / "m.onnx"
            save(load(builders.mlp()), path, external=external)
            before = names(disk)
            with pytest.raises(InputError, match="No space left on device; nothing was changed") as caught:
                save(load(builders.mlp(width=128)), path, external=external)
            one_line(caught)
            assert names(disk) == before
            assert same(path, builders.mlp())
        finally:
            subprocess.run(
                ["umount", "-l", str(disk)],  # lazily: the models loaded above may still map its files
                check=True,
            )

    def test_short_of_space_in_the_middle(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
    ) -> None:
        """The same without the right to mount: the n-th write fails."""
        path = tmp_path / "m.onnx"
        save(load(builders.mlp()), path, external=external)
        before = names(tmp_path)
        real = os.fdopen

        def fdopen(*args: Any, **kwargs: Any) -> Any:
            stream = real(*args, **kwargs)

            class Full:
                def __enter__(self) -> Full:
                    return self

                def __exit__(self, *_: object) -> None:
                    stream.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(stream, name)

                def write(self, data: bytes) -> int:
                    stream.write(bytes(data)[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return Full()

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdopen", fdopen)
            with pytest.raises(InputError, match="No space left"):
                save(load(builders.mlp(seed=1)), path, external=external)
        assert names(tmp_path) == before
        assert same(path, builders.mlp())

    def test_interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
        path = tmp_path / "m.onnx"
        save(load(builders.mlp()), path, external=external)
        before = names(tmp_path)
        real, count = os.fsync, [0]

        def fsync(descriptor: int) -> None:
            count[0] += 1
            if count[0] == (3 if external else 1):  # with a data file: once that is committed already
                raise KeyboardInterrupt
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(KeyboardInterrupt):
                save(load(builders.mlp(seed=1)), path, external=external)
        assert names(tmp_path) == before
        assert same(path, builders.mlp())

    @pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
    def test_kill(self, tmp_path: Path, external: bool) -> None:
        """SIGKILL at random times, a hundred of them or more: what stands there is always one of the two models."""
        code = (
            "import os, sys, builders; from graphopt.model import load; from graphopt.storage import save\n"
            "models = [load(builders.mlp(256, seed=s)) for s in (0, 1)]\n"
            "for line in sys.stdin:\n"
            "    child = os.fork()\n"
            "    while child == 0:\n"
            "        for m in models: save(m, sys.argv[1], external=bool(int(sys.argv[2])))\n"
            "    print(child, flush=True)\n"
            "    print(os.waitpid(child, 0)[1], flush=True)\n"
        )
        path = tmp_path / "m.onnx"
        save(load(builders.mlp(256)), path, external=external)
        good = {fingerprint(load(builders.mlp(256, seed=s))) for s in (0, 1)}
        rng = random.Random(0)
        seen: set[str] = set()
        command = [sys.executable, "-c", code, str(path), str(int(external))]
        with subprocess.Popen(
            command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdin is not None
            assert parent.stdout is not None
            ends, kills = time.monotonic() + 60, 0
            # On a machine that does much else none of a hundred may have come as far as the second model.
            while kills < 100 or (seen != good and time.monotonic() < ends):
                kills += 1
                print("again", file=parent.stdin, flush=True)
                child = int(parent.stdout.readline())
                time.sleep(rng.uniform(0, 0.08 + 0.001 * kills))
                os.kill(child, signal.SIGKILL)
                assert int(parent.stdout.readline()) == signal.SIGKILL
                seen.add(fingerprint(load(path)))
                for left in tmp_path.glob("*.tmp"):  # what a killed process cannot take away
                    left.unlink()
            parent.stdin.close()
        assert seen == good
