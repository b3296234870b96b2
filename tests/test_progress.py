"""Progress on a terminal of 80 columns, in a file, and for nobody."""

import io
import logging

import pytest
import torch
from rich.console import Console

from tailseg import progress
from tailseg.progress import progress_bar
from tailseg.training.step_note import step_note

NOTE = step_note(11, 12, 12.345678, 0.00123456, 123.456, torch.device("cpu"))


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={})


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_note_holds_all_in_a_line_of_a_terminal(monkeypatch):
    assert NOTE == "epoch 11/12, loss 12.35, rate 0.00123, 123 images/s"
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77.2 * 2**30)
    on_gpu = step_note(11, 12, 12.345678, 0.00123456, 123.456, torch.device("cuda", 0))
    assert on_gpu == f"{NOTE}, 77.2 GiB GPU memory"
    assert len(on_gpu) < 80


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_fits_its_terminal_and_shows_everything(width):
    console = terminal(width)
    with progress_bar("training", 90_000, show=True, console=console) as advance:
        advance(1, NOTE)
        advance(45_678, NOTE)
    shown = console.file.getvalue().replace("\r", "\n").split("\n")
    bars = [line for line in shown if "45678/90000" in line]
    assert bars
    for line in bars:
        text = line.replace("\x1b[2K", "").replace("\x1b[1A", "")
        assert "training" in text
        assert "━" in text
        assert "left" in text
        assert len(text) <= width
    assert any(line.strip() == NOTE for line in shown)


def test_a_note_beyond_the_terminal_is_cut():
    console = terminal(40)
    with progress_bar("training", 10, show=True, console=console) as advance:
        advance(1, "x" * 100)
    assert "x" * 39 + "…" in console.file.getvalue()
    assert "x" * 41 not in console.file.getvalue()


def test_without_a_terminal_a_line_comes_for_each_note(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress_bar("training", 100, show=True, lines="notes", console=plain()) as advance:
        advance(20)  # as a resumed run begins
        clock[0] += 10
        advance(21, "loss 3")
        advance(22, "loss 3")
        clock[0] += 50
        advance(40, "loss 2")
    assert caplog.messages == [
        "training: 21/100, loss 3, 0:13:10 left",  # 10 s a step, 79 steps
        "training: 40/100, loss 2, 0:03:00 left",  # 60 s for 20 steps
    ]


def test_without_a_terminal_other_work_tells_every_half_minute(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress_bar("evaluating", 10, show=True, console=plain()) as advance:
        for done in range(1, 10):
            advance(done)
            clock[0] += 8
    assert caplog.messages == ["evaluating: 5/10, 0:00:40 left", "evaluating: 9/10, 0:00:08 left"]
    caplog.clear()
    with progress_bar("importing", None, show=True, console=plain()) as advance:
        clock[0] += 31
        advance(1234)
    assert caplog.messages == ["importing: 1234"]


def test_quiet_work_says_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    console = terminal()
    for lines in ("notes", "seconds"):
        with progress_bar("training", 3, show=False, lines=lines, console=console) as advance:
            clock[0] += 100
            advance(1, NOTE)
    assert console.file.getvalue() == ""
    assert caplog.messages == []
