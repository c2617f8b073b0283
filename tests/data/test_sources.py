"""Against a real local server."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ask_dist.data.audio import BadSample
from ask_dist.data.sources import Source, check_url
from ask_dist.errors import InputError

CONTENT = bytes(range(256)) * 8000
requests: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path: whole, after failures, short, never, or with an error."""

    def do_GET(self) -> None:
        requests[self.path] += 1
        if self.path == "/mended.wav" and requests[self.path] < 3:
            self.send_error(503)
        elif self.path == "/short.wav" or (self.path == "/short_once.wav" and requests[self.path] == 1):
            self.answer(CONTENT[:5000])
        elif self.path == "/broken.wav":
            self.send_error(500)
        elif self.path == "/secret.wav":
            self.send_error(403)
        elif self.path == "/slow.wav":
            time.sleep(1)
        elif self.path == "/drip.wav":
            with suppress(ConnectionError):  # whoever read this gave up
                self.answer(b"")
                for byte in CONTENT:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
        elif self.path in ("/whole.wav", "/mended.wav", "/short_once.wav"):
            self.answer(CONTENT)
        else:
            self.send_error(404)

    def answer(self, body: bytes) -> None:
        """The body, said to be of the full length."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path, timeout=0.3, tries=3, pause=0.01)


@pytest.mark.parametrize(("name", "tries"), [("whole", 1), ("mended", 3), ("short_once", 2)])
def test_a_url_is_read_whole_after_as_many_tries_as_it_takes(
    server: str, source: Source, name: str, tries: int
) -> None:
    assert source.open(f"{server}/{name}.wav").read() == CONTENT
    assert requests[f"/{name}.wav"] == tries


@pytest.mark.parametrize(
    ("name", "tries", "reason"),
    [
        ("broken", 3, "unreadable URL after 3 tries: it answers 500"),
        ("slow", 3, "unreadable URL after 3 tries: no answer within 0.3 s"),
        ("drip", 3, r"unreadable URL after 3 tries: \d+ bytes in [0-9.]+ s, less than 4096 a second"),
        ("short", 3, "unreadable URL after 3 tries: ClientPayloadError"),
        ("secret", 1, "unreadable URL: it answers 403"),
        ("gone", 1, "unreadable URL: not found"),
    ],
)
def test_a_url_that_fails_is_named_after_the_tries_that_may_help(
    server: str, source: Source, name: str, tries: int, reason: str
) -> None:
    with pytest.raises(BadSample, match=reason):
        source.open(f"{server}/{name}.wav")
    assert requests[f"/{name}.wav"] == tries


def test_nobody_listens(source: Source) -> None:
    with pytest.raises(BadSample, match="after 3 tries: ClientConnectorError"):
        source.open("http://127.0.0.1:9/x.wav")


def test_what_is_over_the_size_limit_is_not_read_to_its_end(server: str, tmp_path: Path) -> None:
    (tmp_path / "large.wav").write_bytes(bytes(2 * 2**20))
    for place in (f"{server}/whole.wav", "large.wav"):
        with pytest.raises(BadSample, match="too large: over 1 MiB"):
            Source(tmp_path, most_bytes=2**20).open(place)


def test_a_file_is_read_and_a_missing_one_named(tmp_path: Path, source: Source) -> None:
    (tmp_path / "a.wav").write_bytes(CONTENT)
    assert source.open("a.wav").read() == CONTENT
    with pytest.raises(BadSample, match="unreadable file: No such file"):
        source.open("b.wav")


def test_a_disk_that_fails_costs_the_file_alone() -> None:
    with pytest.raises(BadSample, match="unreadable file: Input/output error"):
        Source(Path("/proc/self")).open("mem")


def test_a_tagged_file_is_read_whole(tmp_path: Path, source: Source) -> None:
    (tmp_path / "a.mp3").write_bytes(b"ID3" + CONTENT)
    assert source.open("a.mp3").read() == b"ID3" + CONTENT


def test_a_pipe_is_not_waited_for(tmp_path: Path, source: Source) -> None:
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(BadSample, match="unreadable file: it is no regular file"):
        source.open("a.wav")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "pipe://x", "simplecache::http://a", "http://a::file://b"])
def test_other_kinds_of_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"^line 3: .* is not read"):
        check_url(url, "line 3")
