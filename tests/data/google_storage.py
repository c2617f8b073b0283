"""Google Cloud Storage on this machine: gcp-storage-emulator, and the refusals that it doesn't know."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from http.server import HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


class GoogleServer(HTTPServer):
    """A server with one bucket, which refuses as it is told to.

    Attributes:
        forbidden: names of objects that nobody may read.
        token: what a request must bear, or None where anonymous ones are served.
        busy: how many of the next requests are answered 503.
        requests: how many came for each path.
    """

    def __init__(self, bucket: str) -> None:
        storage = Storage(use_memory_fs=True)
        create_bucket(bucket, storage)
        self.forbidden: set[str] = set()
        self.token: str | None = None
        self.busy = 0
        self.requests: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), partial(_Handler, storage))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def account(self, file: Path) -> None:
        """Writes the key file of a service account that gets its tokens here."""
        key = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        facts = {"type": "service_account", "project_id": "tests", "client_email": "tests@example.org"}
        file.write_text(json.dumps(facts | {"private_key": key.decode(), "token_uri": f"{self.url}/token"}))


class _Handler(RequestHandler):
    server: GoogleServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests[path] += 1
        bearer = self.headers.get("Authorization")
        if self.server.busy:
            self.server.busy -= 1
            self._answer(503, {"error": {"code": 503, "message": "We encountered an internal error"}})
        elif self.server.token is not None and bearer != f"Bearer {self.server.token}":
            self._answer(401, {"error": {"code": 401, "message": "Anonymous caller does not have access"}})
        elif path.partition("/o/")[2] in self.server.forbidden:
            self._answer(403, {"error": {"code": 403, "message": "tests does not have storage.objects.get access"}})
        else:
            super().do_GET()

    def do_POST(self) -> None:
        if self.path == "/token":
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, {"access_token": self.server.token, "expires_in": 3600, "token_type": "Bearer"})
        else:
            super().do_POST()

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
