"""The served page without a browser: its programming interface, downloads, what it refuses, and many users at once."""

import html
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from colour_model import colour_model, drawn
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'tailseg[app]'")

import httpx
from gradio_client import Client, handle_file
from page_server import served

from tailseg.app import server
from tailseg.app.server import listening
from tailseg.errors import UserError

DISCS = [(40, 30, 12, 0), (4, 80, 10, 1)]  # a fork of 0.9; an egg cup at the edge, of 0.6
USERS = 20
SLOW = 0.05  # seconds of a call of the model


class Watched:
    """A model that counts how many calls run at the same time."""

    def __init__(self) -> None:
        self._model = colour_model(96)
        self.categories = self._model.categories
        self.running = self.most = self.calls = 0

    def predict(self, source: Any) -> Any:
        self.running += 1
        self.calls += 1
        self.most = max(self.most, self.running)
        time.sleep(SLOW)
        found = self._model.predict(source)
        self.running -= 1
        return found


@pytest.fixture(scope="module")
def model() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def address(model: Watched) -> Iterator[str]:
    with served(model) as url:
        yield url


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(drawn(96, 128, DISCS)).save(path)
    return path


@pytest.fixture(scope="module")
def user(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


def detected(user: Client, *files: Path, score: float = 0.5) -> dict[str, Any]:
    """What the page shows after files are dropped."""
    results = user.predict([handle_file(file) for file in files], score, api_name="/detect")
    return dict(zip(("files", "faults", "picture", "classes", "about", "image", "rows", "links"), results, strict=True))


def links(shown: str) -> dict[str, str]:
    """The downloads in the page, by what they are called."""
    return {name: html.unescape(href) for href, name in re.findall(r'<a href="([^"]+)" download>(\w+)</a>', shown)}


def test_pictures_are_looked_at_once_and_drawn_often(user: Client, model: Watched, photo: Path) -> None:
    calls = model.calls
    found = detected(user, photo)
    assert "photo.png: 2 objects" in found["about"]
    assert found["image"].startswith('<figure class="tailseg-picture"><img src="data:image/jpeg;base64,')
    assert [row[:3] for row in found["rows"]["data"]] == [["fork", "frequent", 0.9], ["egg_cup", "rare", 0.6]]
    about, image, rows, _ = user.predict(0, 0.7, [], api_name="/show")
    assert "photo.png: 1 object<" in about
    assert [row[0] for row in rows["data"]] == ["fork"]
    assert image != found["image"]
    _, _, rows, _ = user.predict(0, 0.0, [1], api_name="/show")
    assert [row[0] for row in rows["data"]] == ["egg_cup"]
    assert model.calls == calls + 1


def test_downloads(user: Client, address: str, photo: Path) -> None:
    shown = links(detected(user, photo, score=0.7)["links"])
    assert set(shown) == {"JSON", "COCO", "Pictures"}
    answers = {name: httpx.get(address + path) for name, path in shown.items()}
    assert all(answer.status_code == 200 for answer in answers.values())
    assert "detections.json" in answers["JSON"].headers["content-disposition"]
    (content,) = answers["JSON"].json()
    assert [one["category"] for one in content["detections"]] == ["fork"]
    assert [one["category_id"] for one in answers["COCO"].json()["annotations"]] == [5]
    assert answers["Pictures"].content[:3] == b"\xff\xd8\xff"
    for label, status in ((0, 200), (1 << 64, 422), (-1, 422), ("fork", 422)):
        assert httpx.get(f"{address}{shown['JSON']}&label={label}").status_code == status
    detected(user, photo)  # what was before is gone
    assert httpx.get(address + shown["JSON"]).status_code == 404
    assert httpx.get(f"{address}download/unknown/json").status_code == 404
    assert httpx.get(address + shown["JSON"].replace("0.7", "2")).status_code == 422


def test_a_hostile_file_is_refused_in_the_words_of_predict(user: Client, photo: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>.png"
    hostile.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    found = detected(user, hostile, photo)
    assert ".png: not an image that can be read; replace it by a JPEG or PNG file" in found["faults"]
    assert "<img" not in found["faults"]
    assert "photo.png: 2 objects" in found["about"]
    alone = detected(user, hostile)
    assert alone["rows"]["data"] == []
    assert alone["image"] == ""


def test_uploads_do_not_stay(model: Watched, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users may send the same file at the same time, so it is not removed as soon as it is read."""
    monkeypatch.setattr(server, "SWEEP", 0.2)
    monkeypatch.setattr(server, "KEPT_FOR", 0.2)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/before")
    with served(model) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o077 == 0  # no other user of the machine looks into it
        with photo.open("rb") as file:
            (sent,) = httpx.post(f"{address}gradio_api/upload", files={"files": file}).json()
        assert Path(sent).is_relative_to(folder)
        deadline = time.monotonic() + 20
        while Path(sent).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(sent).exists()
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "/before"


@pytest.mark.parametrize("place", ["file=/etc/passwd", "file={here}", "file/etc/passwd", "proxy=http://127.0.0.1:1/"])
def test_nothing_on_the_disk_is_served(address: str, photo: Path, place: str) -> None:
    for here in (photo, Path.cwd() / "README.md", Path(__file__)):
        answer = httpx.get(f"{address}gradio_api/{place.format(here=here)}")
        assert answer.status_code in (400, 403, 404), answer.text
        assert "root:" not in answer.text


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:1/photo.png", "/proc/self/environ"])
@pytest.mark.parametrize("route", ["queue/join", "run/detect", "call/detect", "call/show", "queue/join/"])
def test_no_path_in_a_request_is_followed(address: str, route: str, path: str) -> None:
    file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[file], 0.5], "fn_index": 0, "session_hash": "me"}
    answer = httpx.post(f"{address}gradio_api/{route}", json=body)
    assert answer.status_code == 403
    assert answer.text == "only files that were uploaded can be looked at"


def test_the_page_names_no_other_server(address: str) -> None:
    page = httpx.get(address).text
    loaded = re.findall(r'(?:src|<link[^>]*href)="(https?:[^"]+)"', page)
    assert [url for url in loaded if not url.startswith(address.rstrip("/"))] == []
    assert "fonts.googleapis" not in page
    assert httpx.get(f"{address}config").json()["analytics_enabled"] is False


def test_a_file_that_is_too_large_is_refused_while_it_comes(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"0" * ((32 << 20) + 1))})
    assert answer.status_code == 413


def test_users_queue_and_one_call_of_the_model_runs_at_a_time(
    user: Client, address: str, model: Watched, photo: Path
) -> None:
    users = [user, Client(address, verbose=False, analytics_enabled=False)]  # of which each asks ten times at once
    model.most, calls, started = 0, model.calls, time.monotonic()
    with ThreadPoolExecutor(USERS) as pool:
        waiting = [pool.submit(detected, users[i % 2], photo) for i in range(USERS)]
        time.sleep(2 * SLOW)
        answered = time.monotonic()
        assert httpx.get(address).status_code == 200  # while they wait
        page_took = time.monotonic() - answered
        found = [one.result(timeout=60) for one in waiting]
    assert all("photo.png: 2 objects" in one["about"] for one in found)
    assert model.calls == calls + USERS
    assert model.most == 1
    assert page_took < 10
    assert time.monotonic() - started < 45  # a second, where the machine is free


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--port {port}: cannot listen on 127.0.0.1:{port} \(.*in use\); choose"):
            listening("127.0.0.1", port).__enter__()


def test_an_address_of_nobody() -> None:
    with pytest.raises(UserError, match=r"^--host no\.invalid: no such address; use"):
        listening("no.invalid", 0).__enter__()
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        listening("192.0.2.1", 0).__enter__()
