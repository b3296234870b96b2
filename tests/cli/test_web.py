"""The command `tailseg app`: how it starts, is refused, and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from predictions import save_random_model
from tiny import assert_refused, tailseg

from tailseg.cli import web

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'tailseg[app]'")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_random_model(path)
    return path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_without_gradio_it_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    assert_refused(tailseg("app", model), "the page needs gradio; install it with: pip install 'tailseg[app]'")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(tailseg("app", tmp_path / "no.safetensors"), "no.safetensors")


def test_a_port_in_use(model: Path, taken_port: int) -> None:
    done = tailseg("app", model, "--port", taken_port, "--device", "cpu")
    assert_refused(done, f"--port {taken_port}: cannot listen on 127.0.0.1", "choose another port")


def test_an_address_of_no_machine(model: Path) -> None:
    assert_refused(
        tailseg("app", model, "--host", "no.invalid", "--device", "cpu"), "--host no.invalid: no such address"
    )


def test_a_port_beyond_all_ports(model: Path) -> None:
    assert tailseg("app", model, "--port", 70_000).returncode == 2


def test_it_ends_without_a_trace(model: Path, tmp_path: Path) -> None:
    """Ctrl-C, and what a container's engine sends: the folder of uploads goes, and no traceback comes."""
    line = [sys.executable, "-m", "tailseg", "app", str(model), "--port", "0", "--device", "cpu"]
    running = {}
    for how in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / how.name
        folder.mkdir()
        surroundings = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
        running[how] = folder, subprocess.Popen(line, env=surroundings, stdout=PIPE, stderr=PIPE, text=True)
    for how, (folder, process) in running.items():
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        assert re.fullmatch(rf"{re.escape(str(model))} is at http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)", said)
        assert len(list(folder.glob("tailseg-app-*"))) == 1
        process.send_signal(how)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "", "")
        assert not list(folder.glob("tailseg-app-*"))
