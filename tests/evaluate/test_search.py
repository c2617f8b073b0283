import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.data.samples import LARGEST, SOUNDS
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.evaluate.search import CLIPS, FEATURES, Hit, IndexedClip, SearchIndex, extract_clip

SHARD = "test-000000.tar"


def flac(seed: int) -> bytes:
    samples = 0.1 * np.random.default_rng(seed).normal(size=800)
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def index() -> SearchIndex:
    features = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    clips = tuple(IndexedClip(f"clip-{i}", (f"sound {i} <b>", "another"), SHARD, "test") for i in range(30))
    return SearchIndex(features, clips)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_was_written_is_loaded(index, tmp_path, dtype):
    written = SearchIndex(index.audio_features.astype(dtype), index.clips)
    written.write(tmp_path / "index")
    loaded = SearchIndex.load(tmp_path / "index")
    assert loaded.clips == written.clips
    assert loaded.audio_features.dtype == dtype
    np.testing.assert_array_equal(loaded.audio_features, written.audio_features)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [FEATURES, CLIPS]


def test_search_sorts_by_cosine(index):
    query = np.random.default_rng(1).normal(size=8)
    cosine = index.audio_features @ query / np.linalg.norm(index.audio_features, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosine)[:7]
    hits = index.search(query, 7)
    assert [hit.key for hit in hits] == [f"clip-{i}" for i in order]
    assert [hit.score for hit in hits] == pytest.approx(cosine[order], abs=1e-6)
    assert (hits[0].caption, hits[0].shard, hits[0].split) == (f"sound {order[0]} <b>", SHARD, "test")


def test_more_hits_than_clips_are_all_clips(index):
    assert len(index.search(np.ones(8), 100)) == 30


def test_a_clip_without_captions_is_found_with_an_empty_one():
    index = SearchIndex(np.eye(2, dtype=np.float32), tuple(IndexedClip(key, (), SHARD, "test") for key in "ab"))
    assert index.search(np.array([0.0, 1.0]), 1)[0].caption == ""


def test_queries_that_do_not_fit_are_refused(index):
    with pytest.raises(InputError, match=r"shape \(4,\), the index \[8\]"):
        index.search(np.ones(4), 1)
    with pytest.raises(InputError, match="not finite"):
        index.search(np.full(8, np.nan), 1)


def test_embeddings_that_do_not_fit_are_refused(index):
    with pytest.raises(InputError, match="29 embeddings but 30 clips"):
        SearchIndex(index.audio_features[:29], index.clips)
    with pytest.raises(InputError, match="float64"):
        SearchIndex(index.audio_features.astype(np.float64), index.clips)
    with pytest.raises(InputError, match="not finite"):
        SearchIndex(np.full((30, 8), np.inf, dtype=np.float32), index.clips)


def drop_features(folder: Path) -> None:
    (folder / FEATURES).unlink()


def cut_features(folder: Path) -> None:
    data = (folder / FEATURES).read_bytes()
    (folder / FEATURES).write_bytes(data[: len(data) // 2])


def drop_a_clip(folder: Path) -> None:
    lines = (folder / CLIPS).read_text().splitlines(keepends=True)
    (folder / CLIPS).write_text("".join(lines[:-1]))


def break_text(folder: Path) -> None:
    (folder / CLIPS).write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_features, f"no {FEATURES}"),
        (cut_features, "can't be read"),
        (drop_a_clip, "don't belong together"),
        (break_text, "not UTF-8"),
    ],
)
def test_a_damaged_folder_is_refused(index, tmp_path, damage, message):
    index.write(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        SearchIndex.load(tmp_path)


@pytest.mark.parametrize("bad", [{"key": "../x"}, {"shard": "../x.tar"}, {"shard": "x.zip"}])
def test_a_folder_that_points_elsewhere_is_refused(index, tmp_path, bad):
    clip = IndexedClip(**({"key": "a", "captions": ("a",), "shard": SHARD, "split": "test"} | bad))
    SearchIndex(index.audio_features[:1], (clip,)).write(tmp_path)
    assert json.loads((tmp_path / CLIPS).read_text())["captions"] == ["a"]
    with pytest.raises(InputError, match="should match pattern"):
        SearchIndex.load(tmp_path)


def split_of(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    write_tar(folder / SHARD, members)
    shard = {"clips": 1, "seconds": 1.0, "sha256": ""}
    sizes = {"format": 1, "sample_rate": 16000, "classes": {}, "shards": {SHARD: shard}}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def hit(key: str, shard: str = SHARD) -> Hit:
    return Hit(1.0, key, "", shard, "test")


@pytest.mark.parametrize("extension", SOUNDS)
def test_extracted_sound_is_the_member_byte_for_byte(tmp_path, extension):
    sounds = {f"{key}.{extension}": flac(seed) for seed, key in enumerate("abc")}
    shards = ShardList.load(split_of(tmp_path / "test", {"a.json": b"{}", **sounds}))
    out = extract_clip(shards, hit("b"), tmp_path / "01-b")
    assert out == tmp_path / f"01-b.{extension}"
    assert out.read_bytes() == sounds[f"b.{extension}"]


def test_of_shards_with_one_name_the_one_with_the_key_is_meant(tmp_path):
    folders = [split_of(tmp_path / key, {f"{key}.flac": flac(seed)}) for seed, key in enumerate("abc")]
    assert extract_clip(ShardList.load(folders), hit("b"), tmp_path / "hit").read_bytes() == flac(1)


def test_what_is_no_sound_of_that_key_is_not_extracted(tmp_path):
    folder = split_of(tmp_path / "test", {"a.flac": flac(0), "text.json": b"{}", "two.wav": b"", "two.mp3": b""})
    with tarfile.open(folder / SHARD, "a") as tar:
        link = tarfile.TarInfo("link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        large = tarfile.TarInfo("large.flac")
        large.size = LARGEST["flac"] + 1
        tar.fileobj.write(large.tobuf())
    shards = ShardList.load(folder)
    reasons = {"missing": "no clip missing", "link": "no clip link", "text": "no sound", "two": "several sounds"}
    for key, reason in (reasons | {"large": "over the limit of 256 MiB"}).items():
        with pytest.raises(InputError, match=reason):
            extract_clip(shards, hit(key), tmp_path / "hit")
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_shards_that_are_not_listed_and_damaged_ones_are_refused(tmp_path):
    folder = split_of(tmp_path / "inside", {"a.flac": flac(0)})
    shards = ShardList.load(folder)
    with pytest.raises(InputError, match=r"no shard other\.tar"):
        extract_clip(shards, hit("a", "other.tar"), tmp_path / "hit")
    (folder / SHARD).write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="no clip a in"):
        extract_clip(shards, hit("a"), tmp_path / "hit")
    (folder / SHARD).unlink()
    with pytest.raises(InputError, match="No such file"):
        extract_clip(shards, hit("a"), tmp_path / "hit")
