"""The lock of a folder: between processes, after a kill, with workers that outlive their training."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tailseg.errors import UserError
from tailseg.training.run_lock import remove_unfinished, run_lock

HOLD = textwrap.dedent(
    """
    import multiprocessing, sys, time
    from pathlib import Path
    from tailseg.training.run_lock import run_lock

    with run_lock(Path(sys.argv[1])):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        print(worker.pid, flush=True)
        time.sleep(60)
    """
)


def test_a_killed_process_keeps_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match=rf"^{out}: process {process.pid} on \S+ is training in this folder; wait"):
            run_lock(out).__enter__()
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives on
        with run_lock(out):
            assert (out / ".lock").read_text().startswith(f"{os.getpid()} on ")
    finally:
        process.kill()
        process.stdout.close()
        os.kill(worker, signal.SIGKILL)


def test_released_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing came of it
    with run_lock(tmp_path), pytest.raises(UserError, match="is training in this folder"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with run_lock(tmp_path):
        pass
    assert f"{tmp_path}: cannot be locked ([Errno 95] Operation not supported)" in caplog.text


def test_unfinished_files_alone_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tailseg")
    inner = tmp_path / "features" / "0"
    inner.mkdir(parents=True)
    kept = [tmp_path / "last.safetensors", tmp_path / "detections.json", inner / "0-1.safetensors"]
    gone = [
        *(tmp_path / name for name in (".last.safetensors.1.part", ".metrics.jsonl.part", ".detections.1.json")),
        *(tmp_path / name for name in (".detections.1.json.partial", "detections.json.partial")),
        tmp_path / "features" / ".about.json.part",
        inner / ".0-1.safetensors.9.part",
    ]
    for path in (*kept, *gone):
        path.touch()
    remove_unfinished(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert "removed 7 unfinished files of a run that was killed" in caplog.text
    caplog.clear()
    remove_unfinished(tmp_path)
    assert caplog.text == ""
