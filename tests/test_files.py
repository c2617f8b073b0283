"""Atomic writes."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ask_dist.files import regular_size, write_atomically


def test_content_is_written_and_nothing_else_stays(tmp_path):
    write_atomically(tmp_path / "a.json", b"one")
    write_atomically(tmp_path / "a.json", b"two")
    assert (tmp_path / "a.json").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_older_file_untouched(tmp_path):
    write_atomically(tmp_path / "a.json", b"one")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a.json", "not bytes")  # type: ignore[arg-type]
    assert (tmp_path / "a.json").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a.json", b"one")


def test_a_regular_file_is_told_from_what_is_none(tmp_path):
    (tmp_path / "a").write_bytes(bytes(300))
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    assert regular_size(tmp_path / "a") == regular_size(tmp_path / "link") == 300
    for odd in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="it is no regular file"):
            regular_size(odd)
    with pytest.raises(FileNotFoundError):
        regular_size(tmp_path / "missing")


def test_writers_in_one_process_do_not_meet(tmp_path):
    contents, together = [bytes([value]) * 200_000 for value in range(8)], threading.Barrier(8)

    def write(content: bytes) -> None:
        together.wait()
        write_atomically(tmp_path / "a.bin", content)

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(write, contents))
    assert (tmp_path / "a.bin").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, contents = tmp_path / "a.bin", [bytes([value]) * 200_000 for value in range(4)]
    write_atomically(path, contents[0])
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents * 5:
        write_atomically(path, content)
    done.set()
    reader.join()
    assert seen
    assert set(seen) <= set(contents)
