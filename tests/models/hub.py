"""A real HTTP server on this machine that answers as the hub's API does: a repository's tree, and its files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the folders OWNER/NAME below `folder`; with `token` to those alone who send it."""

    daemon_threads = True

    def __init__(self, folder: Path, token: str | None) -> None:
        self.token = token
        self.fetched: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self.send_error(401)
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        try:
            if parts[:2] == ["api", "models"]:
                self._describe(Path(self.directory, *parts[2:4]), "/".join(parts[2:4]), parts[4:])
            else:
                owner, name, _, _, *file = parts  # OWNER/NAME/resolve/REVISION/FILE
                self._send(Path(self.directory, owner, name, *file).read_bytes(), "application/octet-stream")
                if self.command == "GET":
                    self.server.fetched.append("/".join(file))
        except (OSError, ValueError):  # no such file, no such place
            self.send_error(404)

    def _describe(self, folder: Path, repository: str, what: list[str]) -> None:
        names = sorted(path.name for path in folder.iterdir())
        if what[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": name} for name in names
            ]
            self._send(json.dumps(tree).encode(), "application/json")
        else:
            siblings = [{"rfilename": name} for name in names]
            self._send(
                json.dumps({"id": repository, "sha": REVISION, "siblings": siblings}).encode(), "application/json"
            )

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        headers = {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION, "Content-Type": kind}
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path, token: str | None = None) -> Iterator[Hub]:
    """A hub in a thread of this process."""
    with Hub(folder, token) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
