"""The server of the page: its address, its folder for uploads, downloads from memory, and the page itself."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Response
from pydantic import Field

from tailseg.app import html
from tailseg.app.browser import Browser
from tailseg.app.detection_tab import KEPT_FOR, DetectionTab
from tailseg.app.downloads import DOWNLOADS
from tailseg.app.gate import Gate
from tailseg.app.pictures import MOST_BYTES, Choice, Finder
from tailseg.app.sessions import Sessions
from tailseg.app.validation_tab import ValidationTab
from tailseg.errors import UserError

MOST_WAITING = 64  # calls in the queue; who comes then is told to try again
SWEEP = 60  # seconds between two looks for uploads that have lain as long as pictures are kept
PATIENCE = 1  # second that open connections get when the server ends
Label = Annotated[int, Field(ge=0, lt=1 << 31)]  # of a class
_TEMP = "GRADIO_TEMP_DIR"


@contextmanager
def page(model: Finder, title: str, browser: Browser | None = None, *, only_here: bool = True) -> Iterator[FastAPI]:
    """The page as an ASGI application; uploads lie in a folder of its own until they are read, and end with it.

    Args:
        model: finds the objects of pictures.
        title: the page's heading.
        browser: of the validation set, if there is one.
        only_here: requests must name this machine as they do from here; see `Gate`.
    """
    before = os.environ.get(_TEMP)
    with tempfile.TemporaryDirectory(prefix="tailseg-app-", ignore_cleanup_errors=True) as folder:
        os.environ[_TEMP] = folder  # gradio asks for it at each upload
        try:
            app = _application(model, title, browser)
            app.add_middleware(Gate, uploads=Path(folder), only_here=only_here)
            yield app
        finally:
            os.environ.pop(_TEMP)
            if before is not None:
                os.environ[_TEMP] = before


def _application(model: Finder, title: str, browser: Browser | None) -> FastAPI:
    sessions = Sessions()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_downloads(app, sessions)
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(SWEEP, KEPT_FOR)) as blocks:
        gr.HTML(html.heading(title))
        detection = DetectionTab(model, sessions)
        if browser is None:
            detection.build()
        else:
            with gr.Tabs():
                with gr.Tab("Pictures", id="pictures"):
                    detection.build()
                ValidationTab(browser).build()
    blocks.queue(max_size=MOST_WAITING)
    gr.mount_gradio_app(
        *(app, blocks, "/"),
        max_file_size=MOST_BYTES,
        show_error=False,  # of the unforeseen; the terminal has it
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        mcp_server=False,
        css=html.STYLE,
        # Fonts of the machine: none is fetched.
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
    )
    return app


def _add_downloads(app: FastAPI, sessions: Sessions) -> None:
    one_at_a_time = threading.Lock()  # pictures in full size take memory

    @app.get("/download/{key}/{kind}")
    def download(
        key: str,
        kind: str,
        score: Annotated[float, Query(ge=0, le=1)] = 0.5,
        label: Annotated[list[Label] | None, Query()] = None,
    ) -> Response:
        pictures = sessions.get(key)
        if kind not in DOWNLOADS or not pictures:
            raise HTTPException(404, "These pictures were let go: drop them again.")
        with one_at_a_time:
            file = DOWNLOADS[kind](pictures, Choice(score, frozenset(label or ())))
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name)}"}
        return Response(file.content, media_type=file.kind, headers=headers)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of this address, on which nothing is answered yet; port 0 takes a free one.

    Raises:
        UserError: the port is in use or not allowed, or the host is none of this machine's addresses.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UserError(f"--host {host}: no such address; use 127.0.0.1, or 0.0.0.0 for all of this machine") from None
    with socket.socket(family, kind, protocol) as opened:
        # Windows lets a second server share the port where Unix lets it follow a dead one.
        opened.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
        try:
            opened.bind(address)
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot listen on {host}:{port} ({error.strerror}); choose another port or host"
            ) from None
        yield opened


class Server(uvicorn.Server):
    """A server of the page that logs warnings alone; ``run(sockets=[...])`` serves until it is told to end."""

    def __init__(self, app: FastAPI, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=PATIENCE))
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin; ``ready`` is called when pages can be asked for."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; that open pages are cut off then, each with a traceback, is no news."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def serve(app: FastAPI, opened: socket.socket, ready: Callable[[], None]) -> None:
    """Call ``ready``, and serve until Ctrl-C, or until the process is asked to end: its folder is removed then, too."""
    # Uvicorn passes on the signal that ended it, and by itself this one ends a process at once.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        Server(app, ready).run(sockets=[opened])
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)
