"""Requests that end at the door."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from tailseg.app import gate
from tailseg.app.gate import MOST_SENT, MOST_UPLOADED, Gate


class Inner:
    """A server that reads what it is sent and answers 200."""

    body: bytes | None = None

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            self.body = b"other"
            return
        message = await receive()
        self.messages.append(message)
        self.body = message["body"]
        while message.get("more_body"):
            message = await receive()
            self.messages.append(message)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


def ask(
    folder: Path,
    body: bytes = b"",
    *,
    path: str = "/gradio_api/queue/join",
    method: str = "POST",
    length: object = ...,
    host: str | None = None,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> tuple[int, dict[str, str], Inner]:
    inner, sent = Inner(), list[Message]()
    stated = len(body) if length is ... else length
    headers = [] if stated is None else [(b"content-length", str(stated).encode())]
    headers += [] if host is None else [(b"host", host.encode())]
    headers += more
    parts = [body[:7], body[7:]]

    async def receive() -> Message:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Gate(inner, folder, only_here=host is not None)(scope, receive, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, inner


def content(path: object) -> bytes:
    """A request as gradio's page makes it."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return json.dumps({"data": [[file], None, 0.5], "fn_index": 0}).encode()


def test_a_file_that_was_uploaded_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "photo.png").touch()
    sent = content(str(tmp_path / "a" / "photo.png"))
    status, headers, inner = ask(tmp_path, sent)
    assert status == 200
    assert inner.body == sent
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "https://example.com/photo.png",
        "{folder}/../model.safetensors",
        "{folder}",
        "{folder}-other/photo.png",
        "{folder}/link",
        "photo.png",
        "",
        "a\0b",
        None,
        ["/etc/passwd"],
        7,
    ],
)
def test_no_other_path_is(tmp_path: Path, path: object) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "link").symlink_to("/etc/passwd")
    path = path.replace("{folder}", str(uploads)) if isinstance(path, str) else path
    for body in (content(path), json.dumps([{"a": [{"b": {"path": path}}]}]).encode()):
        status, _, inner = ask(uploads, body)
        assert status == 403
        assert inner.body is None


def test_requests_without_paths_pass(tmp_path: Path) -> None:
    assert ask(tmp_path, b'{"data": [0.5, "/etc/passwd"]}')[0] == 200
    assert ask(tmp_path, b"", length=0)[0] == 200
    assert ask(tmp_path, b"", method="GET", path="/", length=None)[0] == 200


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [
        ("/gradio_api/queue/join", MOST_SENT + 1, 413),
        ("/gradio_api/upload", MOST_UPLOADED + 1, 413),
        ("/gradio_api/upload", MOST_UPLOADED, 200),
        ("/gradio_api/upload/", 9, 200),
        ("/gradio_api/upload", None, 411),
        ("/gradio_api/upload", "-1", 411),
        ("/gradio_api/upload", "9" * 5000, 411),
    ],
)
def test_what_is_sent_is_bounded(tmp_path: Path, path: str, length: object, status: int) -> None:
    assert ask(tmp_path, b"not JSON", path=path, length=length)[0] == status


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload"])
def test_chunks_are_refused_whatever_length_is_stated(tmp_path: Path, path: str) -> None:
    status, _, inner = ask(tmp_path, b"{}", path=path, more=[(b"transfer-encoding", b"chunked")])
    assert (status, inner.body) == (411, None)


def test_more_than_is_stated_is_not_read(tmp_path: Path) -> None:
    assert ask(tmp_path, b" " * MOST_SENT, length=9)[0] == 400  # read, and no JSON
    status, _, inner = ask(tmp_path, b" " * (MOST_SENT + 1), length=9)
    assert (status, inner.body) == (413, None)


def test_an_upload_breaks_off_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_UPLOADED", 10)
    assert ask(tmp_path, b"a" * 10, path="/gradio_api/upload")[2].messages == [
        {"type": "http.request", "body": b"a" * 7, "more_body": True},
        {"type": "http.request", "body": b"a" * 3, "more_body": False},
    ]
    assert ask(tmp_path, b"a" * 11, path="/gradio_api/upload", length=9)[2].messages == [
        {"type": "http.request", "body": b"a" * 7, "more_body": True},
        {"type": "http.disconnect"},
    ]


def test_other_than_json_is_refused(tmp_path: Path) -> None:
    assert ask(tmp_path, b"not JSON")[0] == 400
    assert ask(tmp_path, b"[" * 100_000)[0] == 400


def test_what_is_no_request_passes(tmp_path: Path) -> None:
    inner = Inner()
    asyncio.run(Gate(inner, tmp_path, only_here=True)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert inner.body == b"other"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:7860", 200),
        ("evil.example:7860", 403),  # its name was made to point to this machine
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil:1", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_page_for_this_machine_is_asked_for_by_its_own_names(
    tmp_path: Path, host: str, status: int, method: str
) -> None:
    assert ask(tmp_path, b"{}", method=method, host=host)[0] == status
