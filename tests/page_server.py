"""A server of the page in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def served(model: Any, *args: Any) -> Iterator[str]:
    """The address of a page of the model, as long as the block lasts."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'tailseg[app]'")
    from tailseg.app.server import Server, listening, page

    with listening("127.0.0.1", 0) as opened, page(model, "tailseg: colours", *args) as app:
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 60
            while not server.started and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert server.started
            yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
        assert not thread.is_alive()
