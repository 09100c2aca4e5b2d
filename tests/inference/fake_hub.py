"""A Hugging Face hub on this machine: it serves the files of one repository at one commit, and notes which are taken."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.inference.repositories import digest, is_large


class FakeHub(ThreadingHTTPServer):
    """Answers what ``huggingface_hub`` asks, as the hub's own interface does. A context manager."""

    daemon_threads = True

    def __init__(self, repository: str, commit: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.commit, self.folder = repository, commit, folder
        self.taken: list[str] = []
        self.requests: list[str] = []
        self.is_login_page = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server
        hub.requests.append(self.path)
        path = unquote(urlsplit(self.path).path)
        file = hub.folder / path.rpartition("/")[2]
        if hub.is_login_page:
            self._reply(200, b"<html>", {"Content-Type": "text/html"})
        elif f"/{hub.repository}/" not in path:
            self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not {hub.commit, "main"} & set(path.split("/")):
            self._reply(
                404,
                b"{}",
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"},
            )
        elif path.startswith("/api/") and "/revision/" in path:
            names = [{"rfilename": name} for name in self._names()]
            self._reply_json({"id": hub.repository, "sha": hub.commit, "siblings": names})
        elif path.startswith("/api/") and "/tree/" in path:
            self._reply_json([self._entry(hub.folder / name) for name in self._names()])
        elif "/resolve/" in path and file.is_file():
            if self.command == "GET":
                hub.taken.append(file.name)
            self._reply(
                200, file.read_bytes(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": hub.commit}
            )
        else:
            self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _names(self) -> list[str]:
        return sorted(file.name for file in self.server.folder.iterdir())

    def _entry(self, file: Path) -> dict[str, object]:
        size = file.stat().st_size
        entry: dict[str, object] = {
            "type": "file",
            "path": file.name,
            "size": size,
            "oid": "0" * 40,
        }
        return entry | (
            {"lfs": {"oid": digest(file), "size": size, "pointerSize": 1}}
            if is_large(file.name)
            else {}
        )

    def _reply_json(self, content: object) -> None:
        self._reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Print nothing."""
