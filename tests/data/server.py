"""A real HTTP server on this machine that serves a folder, and fails as it is told to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves `folder`; the next requests of a path fail as `faults[path]` lists: "500", "404", "short" or "stall".

    A "drip" sends a byte now and then; what is "slow" comes in pieces, whole in the end.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
        elif fault in ("drip", "slow"):
            self._in_pieces(Path(self.translate_path(self.path)).read_bytes(), fault == "drip")
        elif fault:
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) if fault == "stall" else len(content) // 2))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            if fault == "stall":
                self.wfile.flush()
                self.server.released.wait(30)
        else:
            super().do_GET()

    def _in_pieces(self, content: bytes, bytewise: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        size = 1 if bytewise else len(content) // 10 + 1
        with suppress(ConnectionError):  # whoever read this gave up
            for start in range(0, len(content), size):
                self.wfile.write(content[start : start + size])
                if self.server.released.wait(0.1):
                    return

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server in a thread of this process."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
