"""The door of the server: limits of what is sent to it, no path but those of uploads, no address but its own.

Gradio takes ``{"path": ...}`` in a request for a file that was uploaded. A path that was not, or an address that the
server would fetch, ends here. So does the request of a foreign web page whose name was made to point to this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tailseg.app.pictures import MOST_BYTES, MOST_PICTURES

UPLOAD = "/gradio_api/upload"
MOST_UPLOADED = MOST_PICTURES * MOST_BYTES + (1 << 20)  # bytes at once
MOST_SENT = 1 << 20  # bytes of any other request
HERE = ("127.0.0.1", "localhost", "::1")  # names of this machine
# The page needs no other server. What it does needs scripts and styles that stand in it.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class Gate:
    """Middleware around the whole server.

    Args:
        app: the server.
        uploads: folder of the files that users have sent.
        only_here: the server listens on this machine alone; then it is asked for by no other name.
    """

    def __init__(self, app: ASGIApp, uploads: Path, *, only_here: bool) -> None:
        self._app = app
        self._uploads = uploads
        self._only_here = only_here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        headers, refusal = Headers(scope=scope), None
        upload = scope["path"].rstrip("/") == UPLOAD
        if self._only_here and _host_of(headers) not in HERE:
            refusal = PlainTextResponse("this page is for this machine alone: open it as http://127.0.0.1", 403)
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            refusal = _fault_of_size(headers, MOST_UPLOADED if upload else MOST_SENT)
            if refusal is None and upload:
                receive = _at_most(MOST_UPLOADED, receive)
            elif refusal is None:
                body = await _body_of(receive)
                refusal = _too_large(MOST_SENT) if len(body) > MOST_SENT else self._fault_of_paths(body)
                receive = _again(body, receive)
        if refusal is None:
            await self._app(scope, receive, send_with_policy)
        else:
            await refusal(scope, receive, send_with_policy)

    def _fault_of_paths(self, body: bytes) -> PlainTextResponse | None:
        if not body:
            return None
        try:
            paths = list(_paths_in(orjson.loads(body)))
        except (orjson.JSONDecodeError, RecursionError):
            return PlainTextResponse("the request is not JSON", 400)
        top = os.path.realpath(self._uploads)
        for path in paths:
            if not isinstance(path, str) or "\0" in path or not os.path.realpath(path).startswith(top + os.sep):
                return PlainTextResponse("only files that were uploaded can be looked at", 403)
        return None


def _host_of(headers: Headers) -> str:
    """The name by which the server was asked for, without the port."""
    return re.sub(r":\d+$", "", headers.get("host", "")).strip("[]").lower()


def _fault_of_size(headers: Headers, limit: int) -> PlainTextResponse | None:
    """A length that is stated counts only where the body is not sent in chunks, whatever their number."""
    stated = headers.get("content-length", "")
    if not (stated.isdecimal() and len(stated) < 20) or "transfer-encoding" in headers:
        return PlainTextResponse("the request does not state its length", 411)
    return _too_large(limit) if int(stated) > limit else None


def _too_large(limit: int) -> PlainTextResponse:
    return PlainTextResponse(f"the request is too large, the limit is {limit:,} bytes", 413)


async def _body_of(receive: Receive) -> bytes:
    """The body of a request; of one beyond `MOST_SENT` no more than shows it."""
    parts: list[bytes] = []
    read = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        read += len(parts[-1])
        if read > MOST_SENT or not message.get("more_body", False):
            return b"".join(parts)


def _at_most(limit: int, receive: Receive) -> Receive:
    """A body that breaks off where it goes beyond a limit, as if its sender had left."""
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        return message if read <= limit else {"type": "http.disconnect"}

    return counted


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read once more; then what comes after it."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


def _paths_in(value: Any) -> Iterator[Any]:
    """Every entry "path" in JSON content."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield one["path"]
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
