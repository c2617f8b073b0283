from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ask_dist.data.audio import BadSample
from ask_dist.data.samples import LARGEST, Raw, open_clip, open_description, read_shard


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 3), (4, 6), (9, 1)])
def test_a_stretch_of_a_shard(corpus: Path, first: int, count: int) -> None:
    raws = list(read_shard(corpus / "train-000002.tar", first, count))
    assert [raw.key for raw in raws] == [f"clip-{20 + first + place:03d}" for place in range(count)]
    assert all(raw.problem is None and raw.shard == "train-000002.tar" for raw in raws)


def test_a_truncated_shard_still_gives_as_many_clips(corpus: Path, tmp_path: Path) -> None:
    data = (corpus / "train-000000.tar").read_bytes()
    for size in (0, 100, 512, 700, len(data) // 2, len(data) * 2 // 3):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:size])
        raws = list(read_shard(path, 0, 10))
        whole = [raw for raw in raws if raw.problem is None and {"flac", "json"} <= raw.members.keys()]
        assert len(raws) == 10
        assert len(whole) < 10
        assert [raw.key for raw in whole] == [f"clip-{place:03d}" for place in range(len(whole))]
        assert size < len(data) // 2 or len(whole) >= 4


def test_any_stretch_of_a_short_shard_gives_the_same_reason(corpus: Path, tmp_path: Path) -> None:
    data = (corpus / "train-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: data.index(b"clip-004.flac")])
    problems = [[raw.problem for raw in read_shard(tmp_path / "cut.tar", *part)] for part in ((0, 6), (6, 4))]
    assert problems[0][:4] == [None] * 4
    assert set(problems[0][4:] + problems[1]) == {"the shard has 4 clips that can be read, not all of those listed"}


def test_garbage_and_missing_shards_give_problems(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(20000))
    data = bytearray((corpus / "train-000000.tar").read_bytes())
    middle = len(data) // 1024 * 512
    data[middle : middle + 2048] = np.random.default_rng(0).bytes(2048)
    (tmp_path / "broken.tar").write_bytes(data)
    for name, fewest in (("noise.tar", 10), ("gone.tar", 10), ("broken.tar", 1)):
        raws = list(read_shard(tmp_path / name, 0, 10))
        unusable = 0
        for raw in raws:
            try:
                open_clip(raw, 8000)
            except BadSample:
                unusable += 1
        assert len(raws) == 10
        assert unusable >= fewest


def test_open_clip_gives_audio_and_description(corpus: Path) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 5, 1))
    audio, description = open_clip(raw, 8000)
    np.testing.assert_allclose(audio, np.random.default_rng(5).uniform(-0.5, 0.5, 400), atol=1e-4)
    assert description["captions"] == ["caption 5 a", "caption 5 b", "caption 5 c"]
    assert description["swapped"] is True
    assert len(open_clip(raw, 16000)[0]) == 800


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({}, "KeyError"),
        ([], "TypeError"),
        ({"captions": []}, "no caption"),
        ({"captions": "one"}, "no caption"),
        ({"captions": ["one", " "]}, "no caption"),
        ({"captions": [1]}, "no caption"),
        ({"captions": ["x" * 100_000]}, "a caption of 100000 characters, over the limit of 10000"),
        ({"captions": ["\ud800"]}, "no Unicode text"),
        ({"captions": ["one"], "classes": "dog"}, "classes are not a list"),
    ],
)
def test_open_clip_names_bad_descriptions(corpus: Path, description: Any, reason: str) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 0, 1))
    with pytest.raises(BadSample, match=reason):
        open_clip(Raw("s", "k", {**raw.members, "json": json.dumps(description).encode()}), 8000)


def test_a_description_is_opened_without_the_sound_that_must_be_there(corpus: Path) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 0, 1))
    undecodable = Raw("s", "k", {**raw.members, "flac": b"no audio at all"})
    assert open_description(undecodable) == open_clip(raw, 8000)[1]
    for wrong, reason in (
        ({"json": raw.members["json"]}, "no sound"),
        ({"flac": b""}, "no .json member"),
        ({**raw.members, "json": b"{}"}, "unusable JSON"),
    ):
        with pytest.raises(BadSample, match=reason):
            open_description(Raw("s", "k", wrong))


def test_open_clip_names_broken_and_missing_members(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("x.flac", b"noise"), ("x.json", b'{"captions": ["one"]}'), ("y.json", b"{")])
    first, second = read_shard(path, 0, 2)
    with pytest.raises(BadSample, match="undecodable"):
        open_clip(first, 8000)
    with pytest.raises(BadSample, match="no sound: one"):
        open_clip(second, 8000)
    with pytest.raises(BadSample, match="unusable JSON: JSONDecodeError"):
        open_clip(Raw("s", "k", {"flac": b"", "json": b"{"}), 8000)


def test_pickles_in_a_shard_are_never_opened(corpus: Path, tmp_path: Path) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 0, 1))
    opened = tmp_path / "opened"
    pickle = f"cposix\nsystem\n(S'touch {opened}'\ntR.".encode()
    members = [("x.flac", raw.members["flac"]), ("x.json", raw.members["json"]), ("x.pkl", pickle), ("x.pyd", pickle)]
    open_clip(next(read_shard(tar_of(tmp_path / "a.tar", members), 0, 1)), 8000)
    assert not opened.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"captions": ["\xff"]}', "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b'"captions"', "TypeError"),
        (b'{"captions": [' + b"9" * 10_000 + b"]}", "unusable JSON"),
    ],
)
def test_json_that_is_no_utf8_or_attacks_the_parser_is_named(corpus: Path, data: bytes, reason: str) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 0, 1))
    with pytest.raises(BadSample, match=reason):
        open_clip(Raw("s", "k", {**raw.members, "json": data}), 8000)


def good(corpus: Path) -> dict[str, bytes]:
    return dict(next(read_shard(corpus / "train-000000.tar", 0, 1)).members)


def test_a_repeated_key_is_used_once(corpus: Path, tmp_path: Path) -> None:
    clip = good(corpus)
    members = [(f"{key}.{extension}", clip[extension]) for key in ("x", "y", "x") for extension in ("flac", "json")]
    members += [("z.flac", clip["flac"]), ("z.flac", clip["flac"]), ("z.json", clip["json"])]
    x, y, again, z = read_shard(tar_of(tmp_path / "a.tar", members), 0, 4)
    assert (x.problem, y.problem) == (None, None)
    assert [raw.key for raw in (x, y, again, z)] == ["x", "y", "x", "z"]
    assert again.problem == z.problem == "the key occurs twice in the shard"
    (alone,) = read_shard(tmp_path / "a.tar", 2, 1)
    assert alone == again


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/x", "x y", "", "x" * 81, "\udce4"])
def test_keys_that_could_lead_elsewhere_are_refused(corpus: Path, tmp_path: Path, name: str) -> None:
    clip = good(corpus)
    path = tar_of(tmp_path / "a.tar", [(f"{name}.flac", clip["flac"]), (f"{name}.json", clip["json"])])
    (raw,) = read_shard(path, 0, 1)
    assert raw.problem is not None
    assert "the key is not" in raw.problem
    assert raw.members == {}
    raw.key.encode("ascii")


def test_a_leading_dot_is_no_part_of_the_key(corpus: Path, tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [(f"./x.{extension}", data) for extension, data in good(corpus).items()])
    assert next(read_shard(path, 0, 1)).key == "x"
    open_clip(next(read_shard(path, 0, 1)), 8000)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_devices_and_sparse_files_are_not_opened(corpus: Path, tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("x.flac")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        info = tarfile.TarInfo("x.json")
        info.size = len(good(corpus)["json"])
        tar.addfile(info, io.BytesIO(good(corpus)["json"]))
    with pytest.raises(BadSample, match="no sound"):
        open_clip(next(read_shard(tmp_path / "a.tar", 0, 1)), 8000)


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_members_of_terabytes_and_large_json_are_named_unread(corpus: Path, tmp_path: Path) -> None:
    clip, path = good(corpus), tmp_path / "a.tar"
    path.write_bytes(header("x.json", 1 << 42) + b"{}")
    assert "over the limit of 1 MiB" in str(next(read_shard(path, 0, 1)).problem)
    path.write_bytes(header("x.flac", LARGEST["flac"]) + clip["flac"])
    assert next(read_shard(path, 0, 1)).problem == "the shard ends in its .flac"
    path.write_bytes(header("x.flac", -512) * 3)  # would lead backwards for ever
    assert "has 0 clips that can be read" in str(next(read_shard(path, 0, 1)).problem)
    tar_of(
        path, [("x.flac", clip["flac"]), ("x.json", b" " * ((1 << 20) + 1)), *((f"y.{e}", d) for e, d in clip.items())]
    )
    large, fine = read_shard(path, 0, 2)
    assert "over the limit" in str(large.problem)
    open_clip(fine, 8000)


def test_compressed_tars_are_not_unpacked(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with gzip.open(path, "wb") as file:
        file.write((corpus / "train-000000.tar").read_bytes())
    assert all(raw.problem for raw in read_shard(path, 0, 10))


def test_a_damaged_header_costs_its_own_clip_alone(corpus: Path, tmp_path: Path) -> None:
    data = bytearray((corpus / "train-000000.tar").read_bytes())
    data[data.index(b"clip-003.flac")] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    raws = list(read_shard(tmp_path / "a.tar", 0, 10))
    assert [raw.key for raw in raws] == [f"clip-{place:03d}" for place in range(10)]
    assert [raw.key for raw in raws if "flac" not in raw.members] == ["clip-003"]


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_other_formats_are_members_by_their_extension(corpus: Path, tmp_path: Path, kind: str, subtype: str) -> None:
    sound = io.BytesIO()
    tone = np.sin(np.arange(16000) / 5).astype(np.float32) / 2
    soundfile.write(sound, np.stack([tone, tone], axis=1), 16000, format=kind, subtype=subtype)
    members = [(f"x.{kind.lower()}", sound.getvalue()), ("x.json", good(corpus)["json"])]
    audio, _ = open_clip(next(read_shard(tar_of(tmp_path / "a.tar", members), 0, 1)), 8000)
    assert abs(len(audio) - 8000) < 1200
    assert 0.4 < np.abs(audio).max() < 0.6
    both = [("x.flac", good(corpus)["flac"]), *members]
    with pytest.raises(BadSample, match="several sounds"):
        open_clip(next(read_shard(tar_of(tmp_path / "b.tar", both), 0, 1)), 8000)


@pytest.mark.parametrize("claim", [3 * 3600 * 8000, 2**35, 0])  # three hours; twelve hundred; a length left open
def test_sounds_that_claim_too_much_are_refused_before_decoding(corpus: Path, claim: int) -> None:
    clip = good(corpus)
    flac = bytearray(clip["flac"])
    flac[21:26] = (int.from_bytes(flac[21:26], "big") >> 36 << 36 | claim).to_bytes(5, "big")  # STREAMINFO's samples
    tracemalloc.start()
    with pytest.raises(BadSample, match="too long"):
        open_clip(Raw("s", "k", {**clip, "flac": bytes(flac)}), 8000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_longest_clip_can_be_set(corpus: Path) -> None:
    raw = next(read_shard(corpus / "train-000000.tar", 0, 1))
    open_clip(raw, 8000, 0.05)
    with pytest.raises(BadSample, match="too long"):
        open_clip(raw, 8000, 0.049)
