"""Shards and recordings in object stores, against real servers on this machine."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ask_dist.data.audio import BadSample
from ask_dist.data.cache import ShardCache
from ask_dist.data.loader import Batch, TrainLoader
from ask_dist.data.places import expand
from ask_dist.data.shards import ShardList
from ask_dist.data.sources import Source
from ask_dist.errors import InputError
from tests.data.bucket import Bucket, GoogleBucket, S3Bucket, serving_bucket
from tests.end_to_end.command import ask_dist


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    name = request.node.originalname.replace("_", "-")[:60].strip("-")  # moto's buckets outlive a server
    (tmp_path / "nobody").mkdir()
    with serving_bucket(request.param, name, monkeypatch, tmp_path / "nobody") as bucket:
        yield bucket


only_s3 = pytest.mark.parametrize("bucket", ["s3"], indirect=True)
only_google = pytest.mark.parametrize("bucket", ["gs"], indirect=True)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", tries=2, pause=0.01)


def epoch(shards: ShardList, quarantine: Path | None = None) -> tuple[list[Batch], TrainLoader]:
    loader = TrainLoader(
        shards,
        rank=0,
        world_size=1,
        local_batch_size=16,
        seed=3,
        sample_rate=8000,
        clip_seconds=0.05,
        max_bad_share=0.5,
        quarantine=quarantine,
    )
    return list(itertools.islice(loader.batches(), loader.steps_per_epoch)), loader


def test_a_pattern_in_a_bucket_gives_the_batches_of_the_folder(
    bucket: Bucket, cache: ShardCache, corpus: Path, shards: ShardList
) -> None:
    bucket.put(corpus, "corpora/noise/train")
    place = f"{bucket.url}/corpora/n*/train"
    assert [folder for folder, _ in expand(place)] == [f"{bucket.url}/corpora/noise/train"]
    remote = ShardList.load(place, cache=cache)
    assert (remote.counts, remote.fingerprint) == (shards.counts, shards.fingerprint)
    chosen = ShardList.load(f"{bucket.url}/corpora/noise/train/train-00000{{1..3}}.tar", cache=cache)
    assert chosen.names == shards.names[1:4]
    wanted, _ = epoch(shards)
    got, loader = epoch(remote)
    assert loader.bad.records == []
    bucket.stop()  # all of it is in the cache now
    again, loader = epoch(remote)
    assert loader.bad.records == []
    for batches in (got, again):
        for batch, other in zip(batches, wanted, strict=True):
            assert (batch.keys, batch.captions) == (other.keys, other.captions)
            assert torch.equal(batch.audio, other.audio)


def test_objects_that_cannot_be_had_are_skipped_and_named(
    bucket: Bucket, cache: ShardCache, corpus: Path, tmp_path: Path
) -> None:
    bucket.put(corpus, "train")
    remote = ShardList.load(f"{bucket.url}/train", cache=cache)
    bucket.remove("train/train-000001.tar")
    bucket.write("train/train-000002.tar", b"something else")
    bucket.forbid("train/train-000003.tar")
    batches, loader = epoch(remote, tmp_path / "quarantine.jsonl")
    assert len(batches) == loader.steps_per_epoch
    assert (sum(int(batch.valid.sum()) for batch in batches), loader.bad.count) == (73, 30)
    records = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    reasons = {record["shard"]: record["reason"] for record in records}
    assert sorted(reasons) == [f"train-00000{number}.tar" for number in (1, 2, 3)]
    assert f"after 1 try: {bucket.no_object}" in reasons["train-000001.tar"]
    assert "after 2 tries: 14 bytes came, whose SHA-256 is not" in reasons["train-000002.tar"]
    assert "after 1 try: Forbidden" in reasons["train-000003.tar"]


def test_a_bucket_that_cannot_be_read_is_one_line(bucket: Bucket, cache: ShardCache, corpus: Path) -> None:
    bucket.put(corpus, "train")

    def refused(place: str, reason: str) -> None:
        with pytest.raises(InputError, match=reason) as caught:
            ShardList.load(place, cache=cache)
        assert "\n" not in str(caught.value)

    nowhere = f"{bucket.scheme}://no-such-bucket"
    refused(f"{bucket.url}/test", rf"test/sizes\.json can't be had after 1 try: {bucket.no_object}.*correct the URL")
    refused(f"{nowhere}/train", f"can't be had after 1 try: {bucket.no_bucket}")
    refused(f"{nowhere}/t*", f"can't be listed .{bucket.no_bucket}.*name the folders one by one")
    bucket.forbid("train/sizes.json")
    refused(f"{bucket.url}/train", "can't be had after 1 try: Forbidden")
    bucket.stop()
    refused(f"{bucket.url}/train", f"can't be had after 2 tries: {bucket.away}")
    refused(f"{bucket.url}/tr*", f"can't be listed .{bucket.away}")


@only_s3
def test_credentials_come_from_the_environment_alone(
    bucket: S3Bucket, cache: ShardCache, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(corpus, "train")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bucket.forget()
    with pytest.raises(InputError, match="can't be had after 2 tries: Unable to locate credentials"):
        ShardList.load(f"{bucket.url}/train", cache=cache)


@only_google
def test_a_service_account_is_found_by_the_environment_alone(
    bucket: GoogleBucket, cache: ShardCache, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(corpus, "train")
    bucket.server.token = "of-this-test"
    bucket.forget()
    with pytest.raises(InputError, match="can't be had after 1 try: Anonymous caller does not have access"):
        ShardList.load(f"{bucket.url}/train", cache=cache)
    bucket.server.account(tmp_path / "account.json")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    bucket.forget()
    assert len(ShardList.load(f"{bucket.url}/train", cache=cache).names) == 11


@only_google
def test_a_busy_store_is_asked_again_as_often_as_told(bucket: GoogleBucket, tmp_path: Path) -> None:
    bucket.write("a.wav", b"sound")
    source = Source(tmp_path, tries=3, pause=0.01)
    bucket.server.busy = bucket.asks
    assert source.open(f"{bucket.url}/a.wav").read() == b"sound"
    bucket.server.busy = 1000
    bucket.server.requests.clear()
    with pytest.raises(BadSample, match="unreadable URL after 3 tries: it answers 503"):
        source.open(f"{bucket.url}/a.wav")
    assert bucket.server.requests[f"/storage/v1/b/{bucket.name}/o/a.wav"] == 3  # gcsfs adds no tries of its own


def test_a_source_names_what_a_bucket_refuses(bucket: Bucket, tmp_path: Path) -> None:
    source = Source(tmp_path, tries=2, pause=0.01)
    bucket.write("a.wav", b"sound")
    bucket.write("secret.wav", b"sound")
    bucket.forbid("secret.wav")
    assert source.open(f"{bucket.url}/a.wav").read() == b"sound"

    def refused(name: str, reason: str) -> None:
        with pytest.raises(BadSample, match=reason):
            source.open(f"{bucket.url}/{name}")

    refused("gone.wav", "^unreadable URL: not found")
    refused("secret.wav", "^unreadable URL: (PermissionError Forbidden|it answers 403)")
    bucket.stop()
    refused("a.wav", rf"^unreadable URL after 2 tries: \w+ {bucket.away}")


def test_a_store_that_is_silent_is_waited_for_as_long_as_asked(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        monkeypatch.setenv(bucket.endpoint, f"http://127.0.0.1:{silent.getsockname()[1]}")
        bucket.forget()
        source = Source(tmp_path, timeout=0.3, tries=2, pause=0.01)
        with pytest.raises(BadSample, match=r"unreadable URL after 2 tries: (ReadTimeoutError|no answer)"):
            source.open(f"{bucket.url}/a.wav")
        silent.setblocking(False)
        assert len(list(iter(lambda: accepted(silent), None))) == 2 * bucket.asks


def accepted(server: socket.socket) -> socket.socket | None:
    """A connection that waits, or None."""
    try:
        return server.accept()[0]
    except BlockingIOError:
        return None


def test_recordings_in_a_bucket_are_packed_and_a_store_that_is_away_ends_no_pack(
    bucket: Bucket, tmp_path: Path
) -> None:
    time = np.arange(8000) / 16000
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", 0.4 * np.sin(2 * np.pi * 220 * (number + 1) * time), 16000)
        bucket.write(f"{number}.wav", (tmp_path / f"{number}.wav").read_bytes())
    rows = [f"{bucket.url}/{name},a tone" for name in ("0.wav", "1.wav", "2.wav", "gone.wav")]
    away = f"{bucket.scheme}://nobody/x.wav,a tone"
    (tmp_path / "t.csv").write_text("\n".join(["audio,caption", *rows, away]) + "\n")
    options = ("--processes", "1", "--tries", "1")
    done = ask_dist("pack", tmp_path / "t.csv", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "3 clips" in done.stdout
    records = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert [(record["line"], record["reason"]) for record in records] == [
        (5, "unreadable URL: not found"),
        (6, "unreadable URL: not found"),
    ]
    bucket.stop()
    done = ask_dist("pack", tmp_path / "t.csv", tmp_path / "other", *options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "all 5 audio files" in done.stderr
    assert bucket.away in done.stderr
