"""A local server that answers as the Hugging Face hub does, in what `tailseg.hub` asks of it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_this_test"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories with one commit each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.uploads: dict[str, bytes] = {}  # large files, by sha256
        self.claimed_size: int | None = None  # told instead of a file's size
        self.status: int | None = None  # answered to everything
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object, status: int = 200, **headers: str) -> None:
        self._answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def _refused(self) -> bool:
        self.server.asked.append(f"{self.command} {urlsplit(self.path).path}")
        if self.server.status is not None:
            self._json({"error": "out of order"}, self.server.status)
            return True
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid username or password."}, 401)
            return True
        return False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.server.files
            self.server.files.setdefault(name, {})
            self.server.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            self._json({"url": f"{self.server.url}/{name}"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/.+/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._json({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.server.url}/upload/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    content = self.server.uploads[line["value"]["oid"]]
                else:
                    continue
                self.server.files[found[1]][line["value"]["path"]] = content
            self._json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._json({"error": "no such address"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.uploads[oid] = content
        self._answer(200)

    def do_GET(self) -> None:
        if self._refused():
            return
        about = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/revision/main", urlsplit(self.path).path)
        if about and about[1] in self.server.files:  # asked by versions of the library before 1
            self._json({"id": about[1], "sha": COMMIT, "xetEnabled": False})
            return
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w.-]+)", urlsplit(self.path).path)
        if found is None or found[1] not in self.server.files:
            self._json({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        elif found[2] not in ("main", COMMIT):
            self._json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif found[3] not in self.server.files[found[1]]:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            content = self.server.files[found[1]][found[3]]
            size = len(content) if self.server.claimed_size is None else self.server.claimed_size
            digest = hashlib.sha256(content).hexdigest()
            self._answer(200, content, X_Repo_Commit=COMMIT, ETag=f'"{digest}"', X_Linked_Size=str(size))

    do_HEAD = do_GET


@contextlib.contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub that runs meanwhile."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
