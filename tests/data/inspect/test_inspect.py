"""Verifying, measuring and showing shards, good ones and tampered ones."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.data.inspect.plot import plot
from ask_dist.data.inspect.stats import measure, summarize
from ask_dist.data.inspect.tar_clips import TarClip, clips_of
from ask_dist.data.inspect.verify import verify
from ask_dist.data.pack import write_shards
from ask_dist.data.samples import LARGEST
from ask_dist.data.shards import Clip
from ask_dist.errors import InputError

pytestmark = pytest.mark.multiprocess
FIRST = "train-000000.tar"


@pytest.fixture
def split(tmp_path: Path, corpus: Path) -> Path:
    """A copy of the corpus of 103 clips in eleven shards."""
    return Path(shutil.copytree(corpus, tmp_path / "train"))


def found(folder: Path, **options: bool) -> list[tuple[str, str, str]]:
    return [(problem.shard, problem.key, problem.reason) for problem in verify(folder, processes=1, **options)]


def rewrite(path: Path, change: Callable[[tarfile.TarFile, list[tuple[str, bytes]]], None]) -> None:
    """Write a tar anew with what `change` puts into it, and list its new digest."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        change(tar, members)
    sizes = json.loads((path.parent / "sizes.json").read_text())
    sizes["shards"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "sizes.json").write_text(json.dumps(sizes))


def put(tar: tarfile.TarFile, name: str, content: bytes = b"", **more: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for attribute, value in more.items():
        setattr(member, attribute, value)
    tar.addfile(member, io.BytesIO(content))


def test_what_was_packed_is_verified_with_a_count_of_the_clips(split: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert verify(split, decode=True, processes=2, progress=lambda *call: calls.append(call)) == []
    assert calls[-1] == (103, 103)


def test_changed_missing_and_unlisted_shards_are_named(split: Path) -> None:
    content = bytearray((split / FIRST).read_bytes())
    content[700] ^= 1
    (split / FIRST).write_bytes(content)
    (split / "train-000001.tar").unlink()
    shutil.copy(split / "train-000002.tar", split / "extra.tar")
    (split / "train-000003.tar").write_bytes((split / "train-000003.tar").read_bytes()[:2000])
    (split / "train-000004.tar").write_bytes(b"garbage" * 1000)
    problems = found(split)
    assert ("extra.tar", "", "is not listed in sizes.json") in problems
    assert (FIRST, "", "is not what was packed: its SHA-256 differs from that in sizes.json") in problems
    assert ("train-000001.tar", "", "is listed in sizes.json but missing") in problems
    assert {shard for shard, _, _ in problems} == {"extra.tar", *(f"train-00000{n}.tar" for n in (0, 1, 3, 4))}
    assert ("train-000004.tar", "", "has 0 whole clips, 10 are listed in sizes.json") in problems


def test_members_that_do_not_belong_into_a_shard_are_named(split: Path) -> None:
    def change(tar: tarfile.TarFile, members: list[tuple[str, bytes]]) -> None:
        for name, content in members[:4]:
            put(tar, name, content)
        put(tar, "../../escape.flac", b"x")
        put(tar, "/etc/passwd", b"x")
        put(tar, "link.flac", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        put(tar, "hard.flac", type=tarfile.LNKTYPE, linkname="clip-000.flac")
        put(tar, "pipe.flac", type=tarfile.FIFOTYPE)
        put(tar, "object.pkl", b"x")
        put(tar, "alone.flac", members[0][1])
        put(tar, "wordless.flac", members[0][1])
        put(tar, "wordless.json", b'{"captions": [" "]}')
        put(tar, "torn.json", b"{")
        put(tar, "torn.wav", members[0][1])
        for name, content in members[:2]:
            put(tar, name, content)

    rewrite(split / FIRST, change)
    assert [(key, reason.split(":")[0]) for _, key, reason in found(split)] == [
        ("../../escape.flac", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("link.flac", "is a link to /etc/passwd"),
        ("hard.flac", "is a link to clip-000.flac"),
        ("pipe.flac", "is not a plain file"),
        ("object.pkl", "is no member of a clip"),
        ("alone", "has no .json member"),
        ("wordless", "no caption, or an empty one"),
        ("torn", "unusable JSON"),
        ("clip-000", "occurs twice"),
        ("", "has 3 whole clips, 10 are listed in sizes.json"),
    ]


def test_a_member_that_claims_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "bomb.tar").open("wb") as file:
        member = tarfile.TarInfo("a.flac")
        member.size = 2**40
        file.write(member.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    notes: list[tuple[str, str]] = []
    assert list(clips_of(tmp_path / "bomb.tar", lambda *note: notes.append(note))) == []
    assert notes[0] == ("a.flac", "is cut short")


def test_members_are_held_to_the_limits_of_training(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        put(tar, "large.json", b" " * (LARGEST["json"] + 1), mtime=1.5)
        put(tar, "deep.json", b"[" * 100_000)
        put(tar, "deep.flac", b"x")
        put(tar, "surrogate.json", rb'{"captions": ["\ud800"]}')
        put(tar, "surrogate.flac", b"x")
    notes: list[tuple[str, str]] = []
    assert list(clips_of(tmp_path / "a.tar", lambda *note: notes.append(note))) == []
    assert [(key, reason.split(":")[0]) for key, reason in notes] == [
        ("large.json", "has 1048577 bytes, over the limit of 1 MiB"),
        ("deep", "unusable JSON"),
        ("surrogate", "a caption or class that is no Unicode text"),
    ]


def test_a_key_of_two_shards_is_named(split: Path) -> None:
    def change(tar: tarfile.TarFile, members: list[tuple[str, bytes]]) -> None:
        for name, content in members:
            put(tar, name.replace("clip-013", "clip-004"), content)

    rewrite(split / "train-000001.tar", change)
    assert found(split) == [("train-000001.tar", "clip-004", "is a key of an earlier shard too")]


def test_decoding_finds_what_bytes_do_not_tell(split: Path) -> None:
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(400), 8000, format="FLAC")

    def change(tar: tarfile.TarFile, members: list[tuple[str, bytes]]) -> None:
        for name, content in members:
            put(tar, name, {"clip-002.flac": b"noise", "clip-005.flac": silence.getvalue()}.get(name, content))

    rewrite(split / FIRST, change)
    assert found(split) == []
    assert [(key, reason.split(":")[0]) for _, key, reason in found(split, decode=True)] == [
        ("clip-002", "undecodable audio"),
        ("clip-005", "silent audio"),
    ]


def test_stats_measure_lengths_levels_and_repetition(tmp_path: Path) -> None:
    sine = np.sin(2 * np.pi * 1000 * np.arange(16000) / 8000).astype(np.float32)
    clips = [
        Clip("loud", sine, 8000, ("a loud tone", "a tone")),
        Clip("soft", sine[:4000] / 10, 8000, ("a tone", "a soft tone of half a second")),
        Clip("softer", sine[:8000] / 100, 8000, ("a tone",)),
    ]
    write_shards(clips, tmp_path, "train", clips_per_shard=2)
    (tmp_path / "quarantine.jsonl").write_text('{"line": 2, "audio": "x", "reason": "y"}\n')
    measured = measure(tmp_path, processes=1)
    figures = summarize(tmp_path, measured)
    assert figures["clips"] == 3
    assert figures["hours"] == pytest.approx(3.5 / 3600)
    assert [figures["seconds"][name] for name in ("least", "median", "most")] == [0.5, 1.0, 2.0]
    assert list(measured.loudness) == pytest.approx([-3.01, -23.01, -43.01], abs=0.02)
    assert figures["sample_rates"] == {"8000": 3}
    assert (figures["captions"], figures["captions_met_before"], figures["most_repeated"]) == (5, 2, 3)
    assert (figures["caption_words"]["least"], figures["caption_words"]["most"]) == (2, 7)
    assert (figures["unreadable"], figures["left_out_when_packed"]) == (0, 1)
    plot(measured, "three clips: $100 & more", tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_stats_of_nothing_readable(tmp_path: Path, split: Path) -> None:
    for path in split.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no readable clip"):
        measure(split, processes=1)


def test_every_clip_of_a_good_tar_comes_with_its_extension(split: Path) -> None:
    notes: list[tuple[str, str]] = []
    clips: list[TarClip] = list(clips_of(split / FIRST, lambda *note: notes.append(note)))
    assert [clip.key for clip in clips] == [f"clip-{number:03d}" for number in range(10)]
    assert {clip.extension for clip in clips} == {"flac"}
    assert notes == []
