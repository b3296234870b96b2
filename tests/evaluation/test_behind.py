"""Work behind the back of the loop, with a stream that stands for one of a CUDA device."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tailseg.evaluation.behind import AHEAD, behind, stream_of

CUDA = torch.device("cuda", 1)
SOON = 10  # seconds: nothing here takes as long


class Streams:
    """Stands for `torch.cuda`'s streams and writes down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "Stream", self.made)
        monkeypatch.setattr(torch.cuda, "stream", self.current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "set_device", self.chosen)
        self.device, self.devices = CUDA, []

    def made(self, device: torch.device) -> "Streams":
        self.log.append(f"stream on {device}")
        return self

    def chosen(self, device: torch.device) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.devices.append(device)

    @contextmanager
    def current(self, stream: "Streams") -> Iterator[None]:
        assert stream is self
        assert threading.current_thread() is not threading.main_thread()
        yield

    def record_event(self) -> str:
        return f"event {len([entry for entry in self.log if entry.startswith('wait')])}"

    def wait_event(self, event: str) -> None:
        self.log.append("wait for the event of its call")

    def synchronize(self) -> None:
        self.log.append("synchronize")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    stream_of.cache_clear()
    yield Streams(monkeypatch)
    stream_of.cache_clear()


def test_elsewhere_the_call_does_the_work():
    done: list[tuple[int, str]] = []
    with behind(lambda *arguments: done.append(arguments), torch.device("cpu")) as later:
        later(1, "a")
        assert done == [(1, "a")]


def test_all_evaluations_share_a_stream(streams):
    for _ in range(2):
        with behind(lambda: None, CUDA) as later:
            later()
    assert streams.log.count("stream on cuda:1") == 1
    assert streams.devices == [CUDA, CUDA]  # of each thread, which would begin with device 0


def test_the_loop_goes_on_while_the_work_waits(streams):
    go_on, done = threading.Event(), []

    def work(number: int) -> None:
        assert go_on.wait(SOON)
        done.append(number)

    with behind(work, CUDA) as later:
        for number in range(4):
            later(number)
        assert done == []
        go_on.set()
    assert done == [0, 1, 2, 3]
    assert streams.log == ["stream on cuda:1", *["wait for the event of its call", "synchronize"] * 4]


@pytest.mark.usefixtures("streams")
def test_not_too_many_calls_wait():
    begun, go_on = [], threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        assert go_on.wait(SOON)

    with behind(work, CUDA) as later:
        for number in range(AHEAD):
            later(number)
        assert len(begun) <= 1
        timer = threading.Timer(0.05, go_on.set)
        timer.start()
        later(AHEAD)
        assert go_on.is_set()  # this call had to wait for the first
    assert begun == list(range(AHEAD + 1))


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("calls", [1, AHEAD + 2])
def test_an_error_of_the_work_reaches_the_caller_and_ends_it(calls):
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        raise OSError(f"disk full at {number}")

    def run() -> None:
        with behind(work, CUDA) as later:
            for number in range(calls):
                later(number)

    with pytest.raises(OSError, match="disk full at 0"):
        run()
    assert begun[0] == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("behind")]


@pytest.mark.usefixtures("streams")
def test_after_ctrl_c_nothing_more_is_begun_and_no_thread_is_left():
    begun, first = [], threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        first.set()
        threading.Event().wait(0.05)

    def run() -> None:
        with behind(work, CUDA) as later:
            for number in range(8):
                later(number)
            assert first.wait(SOON)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(begun) < 8
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("behind")]
