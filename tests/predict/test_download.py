"""Against a server in this process."""

import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from predictions import rectangles

import tailseg
from tailseg.errors import UserError
from tailseg.predict.download import download, is_url


def png() -> bytes:
    buffer = BytesIO()
    Image.fromarray(rectangles()).save(buffer, "PNG")
    return buffer.getvalue()


class Pages(BaseHTTPRequestHandler):
    """A picture, and what goes wrong with servers."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/echo/"):
            return self.answer(self.path.encode())
        page = getattr(self, f"page_{self.path.strip('/').split('.')[0]}", None)
        if page is None:
            self.send_error(404)
        else:
            page()

    def answer(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def lead_to(self, place: str) -> None:
        self.send_response(302)
        self.send_header("Location", place)
        self.end_headers()

    def page_cat(self) -> None:
        self.answer(png())

    def page_text(self) -> None:
        self.answer(b"<html>no picture</html>")

    def page_cut(self) -> None:
        self.answer(png()[:50], len(png()))

    def page_moved(self) -> None:
        self.lead_to("/cat.png")

    def page_file(self) -> None:
        self.lead_to("file:///etc/passwd")

    def page_ftp(self) -> None:
        self.lead_to("ftp://127.0.0.1/cat.png")

    def page_circle(self) -> None:
        self.lead_to("/circle")

    def page_silent(self) -> None:
        time.sleep(1)

    def page_slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(20):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def page_headers(self) -> None:
        self.send_response(200)
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-A: ")
        for _ in range(60):
            self.wfile.write(b"a")
            time.sleep(0.05)

    def page_chunks(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;")
        for _ in range(60):
            self.wfile.write(b"a")
            time.sleep(0.05)

    def page_large(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(64):
            self.wfile.write(bytes(1 << 16))


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that go away
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_picture_from_the_web(site: str, model: tailseg.Model) -> None:
    assert download(f"{site}/cat.png") == png()
    assert download(f"{site}/moved") == png()
    found = model.predict(f"{site}/cat.png")
    assert found.source == f"{site}/cat.png"
    assert np.array_equal(found.picture, rectangles())
    assert found.boxes.tolist() == model.predict(rectangles()).boxes.tolist()


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("bäum.jpg", "b%C3%A4um.jpg"),
        ("a b.jpg", "a%20b.jpg"),
        ("a%20b.jpg?x=1&y=[2]", "a%20b.jpg?x=1&y=[2]"),
        ("фото.jpg?имя=1#part", "%D1%84%D0%BE%D1%82%D0%BE.jpg?%D0%B8%D0%BC%D1%8F=1"),
    ],
)
def test_addresses_in_any_alphabet(site: str, path: str, sent: str) -> None:
    assert download(f"{site}/echo/{path}").decode() == f"/echo/{sent}"


def test_hosts_in_any_alphabet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolved(address: tuple[str, int], *_: object, **__: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "create_connection", resolved)
    with pytest.raises(UserError, match=r"http://me@bücher\.example:81/ä: cannot be reached"):
        download("http://me@bücher.example:81/ä")
    assert [(host.rpartition("@")[2], port) for host, port in asked] == [("xn--bcher-kva.example", 81)]


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("dog.png", "the server answers 404 Not Found; check the address"),
        ("file", "leads on to file:///etc/passwd, which is not http or https; download it by hand"),
        ("ftp", "leads on to ftp://127.0.0.1/cat.png, which is not http or https; download it by hand"),
        ("circle", "the server answers 302 "),
        ("cut", "bytes before the end; try again"),
        ("silent", "no answer for 0.3 s; try again later, or download it by hand"),
        ("slow", "not complete after 0.5 s; download it and give the file"),
        ("headers", "not complete after 0.5 s; download it and give the file"),
        ("chunks", "not complete after 0.5 s; download it and give the file"),
        ("large", "larger than 1 MiB; download it and give the file"),
    ],
)
def test_what_goes_wrong_is_a_sentence(site: str, page: str, sentence: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        download(f"{site}/{page}", silence=0.3, total=0.5, most_bytes=1 << 20)
    assert time.monotonic() - begin < 2
    assert str(error.value).startswith(f"{site}/{page}: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_picture(site: str, model: tailseg.Model) -> None:
    with pytest.raises(UserError, match=r"text: not an image that can be read"):
        model.predict(f"{site}/text")


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://127.0.0.1:99999/a", "http://127.0.0.1:x/", "http://a b"]
)
def test_addresses_that_are_none(url: str) -> None:
    assert is_url(url)
    with pytest.raises(UserError, match="check the address"):
        download(url)


def test_other_protocols_are_no_addresses() -> None:
    assert not any(map(is_url, ("file:///a.png", "ftp://a/b.png", "data:image/png,abc", "http.png", "https:/a")))
