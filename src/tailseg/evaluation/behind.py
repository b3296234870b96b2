"""Work on what a CUDA device has found, done while it computes the next batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

AHEAD = 16  # calls that may wait: their detections stay on the device

Later = Callable[..., None]


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all evaluations: the memory that a stream has used stays with it."""
    return torch.cuda.Stream(device)


@contextmanager
def behind(work: Later, device: torch.device) -> Iterator[Later]:
    """A function that does ``work`` behind the back of its caller, in the order of the calls.

    On CUDA the work is done by one thread, on a stream of its own: it waits for what was issued before the call, not
    for what the caller issues after it, and while it waits, encodes or writes, the next batch is on its way. A process
    would take what little Python is left in it off the caller, but needs a second start of the program. Elsewhere the
    processor is busy with the next batch anyway, and the call does the work itself.

    The block ends when all is done. What goes wrong in the thread is raised by a later call, or at the end of the
    block; when the block fails, what has not begun is left out.

    Args:
        work: what to do.
        device: of the tensors that it is called with.
    """
    if device.type != "cuda":
        yield work
        return
    stream = stream_of(device)

    def on_stream(ready: torch.cuda.Event, arguments: tuple[Any, ...]) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            work(*arguments)
            # Before the caller's stream may have the memory of the arguments back.
            stream.synchronize()

    waiting: deque[Future[None]] = deque()
    # A thread starts with device 0, and would go back to it after each call: a context there takes half a gigabyte.
    thread = ThreadPoolExecutor(1, "behind", initializer=torch.cuda.set_device, initargs=(stream.device,))

    def later(*arguments: Any) -> None:
        ready = torch.cuda.current_stream(device).record_event()
        waiting.append(thread.submit(on_stream, ready, arguments))
        while waiting and (waiting[0].done() or len(waiting) > AHEAD):
            waiting.popleft().result()

    try:
        yield later
        while waiting:
            waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
