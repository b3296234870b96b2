"""What Windows lacks, taken away: the tests run on Linux, users also elsewhere."""

import fcntl
import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny import tailseg

from tailseg.checkpoint import write_tensors
from tailseg.data.loading import _DeathNotice
from tailseg.files import new_folder
from tailseg.training import local_ranks
from tailseg.training.step_note import memory_in_use


def test_a_loader_without_the_signal_of_dead_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGCHLD")
    notice = _DeathNotice()
    notice.take_over()
    assert notice.heard(lambda: 3) == 3


def test_a_checkpoint_is_flushed_by_a_file_that_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", fsync)
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    assert flushed == [os.O_RDWR]


def test_memory_without_the_module_of_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert memory_in_use(torch.device("cpu")) > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory_in_use(torch.device("cpu")) == 0


def test_a_folder_that_is_there_and_empty_makes_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, replace = tmp_path / "out", Path.replace
    out.mkdir()

    def as_on_windows(self: Path, target: Path) -> Path:
        assert not target.exists()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", as_on_windows)
    with new_folder(out) as content:
        (content / "a").touch()
    assert [path.name for path in out.iterdir()] == ["a"]


def test_ranks_are_started_from_the_launcher_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    main = type(sys)("__main__")
    main.__spec__ = type("Spec", (), {"name": "__main__"})()
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["C:/tailseg.exe", "train", "x"])
    assert local_ranks._own_command() == [sys.executable, "-m", "tailseg", "train", "x"]


def test_signs_that_a_pipe_s_code_page_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from tailseg.cli.main import main

    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "argv", ["tailseg", "recipes", "list"])
    with pytest.raises(SystemExit, match="0"):
        main()
    pipe.flush()
    assert b"demo/seesaw" in pipe.buffer.getvalue()  # type: ignore[attr-defined]
    assert tailseg("--version").returncode == 0
