"""The bytes of one audio file, below a folder or behind a URL, with limits on time and size."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ask_dist.data.audio import BadSample
from ask_dist.data.places import Pace, TooSlow, may_pass, one_line, reach, status_of
from ask_dist.data.table import URL
from ask_dist.errors import InputError
from ask_dist.files import regular_size

# Not all that fsspec knows: "file" would lead out of the audio folder, and chains ("a::b") into other stores.
PROTOCOLS = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")
BLOCK = 2**20
TAG = b"ID3"


class OutOfReach(BadSample):
    """What may be there at another time."""


@contextmanager
def reading() -> Iterator[None]:
    """For a block that reads a local file: what the operating system says becomes a BadSample."""
    try:
        yield
    except OSError as error:
        raise BadSample(f"unreadable file: {error.strerror or error}") from None


@dataclass(frozen=True)
class Source:
    """Where a table's audio comes from.

    Attributes:
        folder: what paths are relative to; URLs need none.
        most_bytes: a larger file is refused.
        timeout: seconds without an answer, and between two pieces of one; after so many a URL must also be at its pace.
        tries: of a URL that times out, is too slow, breaks off or answers 429 or 5xx.
        pause: seconds before the second try, doubled before each further one.
    """

    folder: Path
    most_bytes: int = 128 * 2**20
    timeout: float = 30.0
    tries: int = 3
    pause: float = 1.0

    def open(self, place: str) -> io.BytesIO | io.FileIO:
        """A file, or the content of a URL, at its start.

        Raises:
            OutOfReach: all tries of a URL failed, by what may pass.
            BadSample: it can't be read, or is too large.
            InputError: the URL needs a package that is missing.
        """
        if URL.match(place):
            return io.BytesIO(self._download(place))
        path = self.folder / place
        with reading():
            if regular_size(path) > self.most_bytes:
                raise self._too_large()
            with io.FileIO(path) as file:
                if file.read(len(TAG)) == TAG:  # behind one libsndfile finds another end in a file than in its bytes
                    return io.BytesIO(TAG + file.readall())
            return io.FileIO(path)

    def _download(self, url: str) -> bytes:
        for tried in range(1, self.tries + 1):
            try:
                return self._download_once(url)
            except (BadSample, InputError):
                raise
            except Exception as error:  # each library has errors of its own, and not all are OSErrors
                reason = self._reason(error)
                if not may_pass(error):
                    raise BadSample(f"unreadable URL: {reason}") from None
            if tried < self.tries:
                time.sleep(self.pause * 2 ** (tried - 1))
        raise OutOfReach(f"unreadable URL after {self.tries} tries: {reason}")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "not found"
        if isinstance(error, TooSlow):
            return str(error)
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout:g} s"
        status = status_of(error)
        return f"it answers {status}" if status else f"{type(error).__name__} {one_line(error)}"

    def _download_once(self, url: str) -> bytes:
        protocol = url.partition("://")[0]
        # Of a web server one request, read as it comes, the size not asked for before.
        how: dict[str, Any] = {"block_size": 0, "size": -1} if protocol in ("http", "https") else {}
        try:
            filesystem, path = reach(url, self.timeout, self.timeout)
        except ImportError as error:
            raise InputError(f"{protocol}:// needs a package that is missing ({error}): install it") from None
        with filesystem.open(path, "rb", **how) as file:
            return self._limited(file)

    def _limited(self, file: Any) -> bytes:
        """All of an open file, or BadSample once it is over the limit, TooSlow where it does not keep the pace."""
        blocks, size, pace = list[bytes](), 0, Pace(self.timeout)
        while block := file.read(BLOCK):
            blocks.append(block)
            size += len(block)
            if size > self.most_bytes:
                raise self._too_large()
            pace.check(size)
        return b"".join(blocks)

    def _too_large(self) -> BadSample:
        return BadSample(f"too large: over {self.most_bytes / 2**20:g} MiB")


def check_url(url: str, place: str) -> None:
    """Raise InputError, beginning with `place`, for a URL of a kind that is not read."""
    protocol, _, rest = url.partition("://")
    if protocol not in PROTOCOLS or "::" in rest:
        raise InputError(f"{place}: {url[:100]!r} is not read: give a path, or one of {', '.join(PROTOCOLS)}://")
