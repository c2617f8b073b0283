from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ask_dist.data.audio import BadSample
from ask_dist.data.cache import ShardCache, file_sha256
from ask_dist.data.captions import captions
from ask_dist.data.loader import Batch, EvalLoader, TrainLoader
from ask_dist.data.shards import ShardList
from ask_dist.errors import DiskError, InputError
from tests.data.server import Server, serving
from tests.mounts import mounted


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    with serving(corpus) as server:
        yield server


def cache_in(folder: Path, **changes: float) -> ShardCache:
    return ShardCache(folder / "cache", pause=0.01, read_seconds=0.3, **changes)


def files_of(cache: ShardCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if not path.name.endswith(".json"))


def epoch(shards: ShardList, **changes: object) -> tuple[list[Batch], TrainLoader]:
    options = {"rank": 0, "world_size": 1, "local_batch_size": 16, "seed": 3, "sample_rate": 8000, "clip_seconds": 0.05}
    loader = TrainLoader(shards, **options | changes)
    return list(itertools.islice(loader.batches(), loader.steps_per_epoch)), loader


def test_shards_behind_a_url_give_what_local_ones_do(server: Server, shards: ShardList, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    remote = ShardList.load(server.url, cache=cache)
    assert (remote.counts, remote.fingerprint) == (shards.counts, shards.fingerprint)
    for _ in range(2):
        for batch, other in zip(epoch(remote)[0], epoch(shards)[0], strict=True):
            assert batch.keys == other.keys
            assert torch.equal(batch.audio, other.audio)
    tars = {path: count for path, count in server.requests.items() if path.endswith(".tar")}
    assert tars == {f"/{name}": 1 for name in shards.names}
    assert list(captions(remote, 1000)) == list(captions(shards, 1000))
    evaluated = EvalLoader(remote, rank=0, world_size=1, batch_size=50, sample_rate=8000, clip_seconds=0.05)
    assert sum(len(batch.keys) for batch in evaluated.batches()) == 103


def test_what_may_pass_is_tried_again(server: Server, shards: ShardList, tmp_path: Path) -> None:
    server.faults["/sizes.json"] = ["500"]
    server.faults |= {
        "/train-000000.tar": ["500", "503"],
        "/train-000001.tar": ["short"],
        "/train-000002.tar": ["stall"],
    }
    batches, loader = epoch(ShardList.load(server.url, cache=cache_in(tmp_path)))
    assert sum(int(batch.valid.sum()) for batch in batches) == 103
    assert loader.bad.records == []
    assert [server.requests[f"/{name}"] for name in shards.names[:4]] == [3, 2, 2, 1]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".partial"]


def test_a_server_that_drips_is_given_up_but_a_slow_one_is_not(
    server: Server, shards: ShardList, tmp_path: Path
) -> None:
    server.faults["/train-000000.tar"] = ["drip", "drip"]
    server.faults["/train-000001.tar"] = ["slow"]
    cache = cache_in(tmp_path, tries=2)
    start = time.monotonic()
    with pytest.raises(BadSample, match=r"after 2 tries: \d+ bytes in [0-9.]+ s, less than 4096 a second"):
        cache.fetch(f"{server.url}/train-000000.tar", tmp_path / "0.tar", 2**20)
    assert time.monotonic() - start < 5
    cache.fetch(f"{server.url}/train-000001.tar", tmp_path / "1.tar", 2**20)
    assert file_sha256(tmp_path / "1.tar") == shards.sha256[1]
    assert server.requests["/train-000001.tar"] == 1


def test_a_shard_that_cannot_be_had_is_skipped_and_named(server: Server, tmp_path: Path) -> None:
    server.faults["/train-000004.tar"] = ["500"] * 100
    server.faults["/train-000005.tar"] = ["404"] * 100
    server.faults["/train-000006.tar"] = ["short"] * 100
    remote = ShardList.load(server.url, cache=cache_in(tmp_path, tries=2))
    batches, loader = epoch(remote, max_bad_share=0.5)
    assert len(batches) == 7
    assert sum(int(batch.valid.sum()) for batch in batches) == 73
    assert loader.bad.count == 30
    reasons = {record["shard"]: record["reason"] for record in loader.bad.records}
    assert "after 2 tries: 500" in reasons["train-000004.tar"]
    assert "after 1 try" in reasons["train-000005.tar"]
    assert "SHA-256 is not that of sizes.json" in reasons["train-000006.tar"]
    assert set(reasons) == {f"train-00000{number}.tar" for number in (4, 5, 6)}
    with pytest.raises(InputError, match="samples are bad, over max_bad_share"):
        epoch(remote)


def test_a_folder_that_is_not_there_is_one_line(server: Server, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    with pytest.raises(InputError, match=r"nowhere/sizes\.json can't be had after 1 try.*correct the URL"):
        ShardList.load(f"{server.url}/nowhere", cache=cache)
    with pytest.raises(InputError, match="can't be had after 4 tries"):
        ShardList.load("http://127.0.0.1:9", cache=cache)


def url_of(shards: ShardList, server: Server, number: int) -> tuple[str, str]:
    return f"{server.url}/{shards.names[number]}", shards.sha256[number]


def test_the_oldest_goes_first_but_none_that_is_open(server: Server, shards: ShardList, tmp_path: Path) -> None:
    size = shards.paths[0].stat().st_size
    cache = cache_in(tmp_path, gib=2.5 * size / 2**30)

    def fetch(number: int) -> Path:
        with cache.opened(*url_of(shards, server, number)) as path:
            assert file_sha256(path) == shards.sha256[number]
        return path

    zero, one = fetch(0), fetch(1)
    os.utime(zero, (1, 1))
    os.utime(one, (2, 2))
    fetch(0)  # used again: one is the oldest now
    two = fetch(2)
    assert files_of(cache) == sorted([zero, two])
    os.utime(zero, (1, 1))
    with cache.opened(*url_of(shards, server, 0)):
        os.utime(zero, (1, 1))
        three = fetch(3)
        assert files_of(cache) == sorted([zero, three])
        with cache.opened(*url_of(shards, server, 3)):
            four = fetch(4)
            assert {zero, three} <= set(files_of(cache))  # over the limit rather than under a reader
    five = fetch(5)
    assert zero not in files_of(cache) or three not in files_of(cache)
    assert four not in files_of(cache) or five in files_of(cache)
    assert sum(path.stat().st_size for path in files_of(cache)) <= 2.5 * size


def test_a_damaged_file_of_an_earlier_run_is_fetched_anew(server: Server, shards: ShardList, tmp_path: Path) -> None:
    url, sha256 = url_of(shards, server, 0)
    with cache_in(tmp_path).opened(url, sha256) as path:
        pass
    path.write_bytes(b"damaged")
    with cache_in(tmp_path).opened(url, sha256) as path:
        assert file_sha256(path) == sha256
    assert server.requests["/train-000000.tar"] == 2


def test_a_server_that_never_stops_is_cut_off(server: Server, shards: ShardList, tmp_path: Path) -> None:
    cache = cache_in(tmp_path, gib=1000 / 2**30)
    with (
        pytest.raises(BadSample, match="after 1 try: over 1000 bytes"),
        cache.opened(*url_of(shards, server, 0)),
    ):
        pass
    assert files_of(cache) == []


def test_a_full_disk_ends_the_run_and_loses_no_shard(server: Server, shards: ShardList, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=16k") as small:
        cache = cache_in(small)
        with pytest.raises(DiskError, match="No space left"), cache.opened(*url_of(shards, server, 0)):
            pass
        assert files_of(cache) == []


def test_two_downloads_of_one_shard_write_to_files_of_their_own(
    server: Server, shards: ShardList, tmp_path: Path
) -> None:
    server.faults["/train-000000.tar"] = ["stall", "stall"]
    cache = ShardCache(tmp_path / "cache", pause=0.01)

    def fetch() -> str:
        with cache.opened(*url_of(shards, server, 0)) as path:
            return file_sha256(path)

    with ThreadPoolExecutor(2) as executor:
        downloads = [executor.submit(fetch), executor.submit(fetch)]
        while len(list(cache.folder.glob(".*.partial"))) < 2:
            assert not any(download.done() for download in downloads)
            time.sleep(0.01)
        server.released.set()
        assert [download.result() for download in downloads] == [shards.sha256[0]] * 2
    assert files_of(cache) == [cache.place(*url_of(shards, server, 0))]


READER = """
import sys
from pathlib import Path
from ask_dist.data.cache import ShardCache, file_sha256
folder, gib, *urls = sys.argv[1:]
cache = ShardCache(Path(folder), float(gib))
for _ in range(3):
    for pair in urls:
        url, sha256 = pair.split(" ")
        with cache.opened(url, sha256) as path:
            assert file_sha256(path) == sha256
"""


@pytest.mark.multiprocess
def test_processes_share_a_folder_that_is_too_small_for_them(server: Server, shards: ShardList, tmp_path: Path) -> None:
    urls = [" ".join(url_of(shards, server, number)) for number in range(6)]
    gib = 2 * shards.paths[0].stat().st_size / 2**30
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(tmp_path / "cache"), str(gib), *order])
        for order in (urls, urls[::-1], urls[3:] + urls[:3])
    ]
    assert [reader.wait() for reader in readers] == [0, 0, 0]
    left = list((tmp_path / "cache").iterdir())
    assert len(left) <= 2
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in left} <= set(shards.sha256)


# From here on the kernel answers each flock of this process with ENOSYS, as it does on some mounts of clusters.
NO_LOCKS = """
import ctypes
import struct
class Program(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
steps = (0x20, 0, 0, 0), (0x15, 0, 1, 73), (0x06, 0, 0, 0x50000 + 38), (0x06, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(steps), ctypes.addressof(code)))) == 0
"""


@pytest.mark.multiprocess
def test_where_files_cannot_be_locked_nothing_is_evicted(server: Server, shards: ShardList, tmp_path: Path) -> None:
    urls = [" ".join(url_of(shards, server, number)) for number in range(6)]
    gib = 2 * shards.paths[0].stat().st_size / 2**30
    command = [sys.executable, "-c", NO_LOCKS + READER, str(tmp_path / "cache"), str(gib), *urls]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't be locked") == 1
    assert len(list((tmp_path / "cache").iterdir())) == 6
    assert all(server.requests[f"/{name}"] == 1 for name in shards.names[:6])
