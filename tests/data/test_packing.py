from __future__ import annotations

import dataclasses
import functools
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from ask_dist.data.inspect.verify import verify
from ask_dist.data.pack_rows import PackSettings
from ask_dist.data.packing import PackSummary, make_keys, pack_table
from ask_dist.data.samples import open_clip, read_clips, read_shard
from ask_dist.data.shards import ShardList
from ask_dist.data.sources import Source
from ask_dist.data.table import Row, read_table
from ask_dist.errors import InputError
from tests.data.server import serving

pytestmark = pytest.mark.multiprocess
RATE = 8000


def pack(table: Path, audio: Path, folder: Path, processes: int = 1, **options: Any) -> PackSummary:
    """pack_table for a table on disk; options of PackSettings, `again` and `progress`."""
    rest = {name: options.pop(name) for name in ("again", "progress") if name in options}
    settings = PackSettings(**{"sample_rate": RATE} | options)
    return pack_table(read_table(table), Source(audio), folder, settings, name=str(table), processes=processes, **rest)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder of audio files: two good ones, of which one is stereo at 44.1 kHz, and four bad ones."""
    folder = tmp_path / "sounds"
    (folder / "dogs").mkdir(parents=True)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (44100, 2))
    soundfile.write(folder / "dogs" / "Bark 1.wav", noise, 44100)
    soundfile.write(folder / "cat.flac", noise[:800, 0], 8000)
    soundfile.write(folder / "silent.wav", noise[:800, 0] * 0, 8000)
    soundfile.write(folder / "empty.wav", noise[:0, 0], 8000)
    soundfile.write(folder / "wordless.wav", noise[:800, 0], 8000)
    (folder / "noise.wav").write_bytes(b"noise")
    return folder


def test_a_table_is_packed_and_bad_rows_are_named(tmp_path: Path, sounds: Path) -> None:
    lines = ["audio,caption,class", "dogs/Bark 1.wav,a dog barks,dog", "cat.flac,a cat,cat", "cat.flac,it meows,"]
    lines += [f"{name},words," for name in ("silent.wav", "empty.wav", "noise.wav", "gone.wav", "")] + [
        "wordless.wav, ,"
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    calls: list[tuple[int, int]] = []
    out = tmp_path / "out"
    summary = pack(tmp_path / "t.csv", sounds, out, sample_rate=16000, progress=lambda *call: calls.append(call))
    assert (summary.clips, summary.shards, summary.classes) == (2, 1, {"cat": 1, "dog": 1})
    assert summary.seconds == pytest.approx(1.1)
    reasons = {record["audio"]: record["reason"].split(":")[0] for record in summary.skipped}
    assert reasons == {
        "silent.wav": "silent audio",
        "empty.wav": "empty audio",
        "noise.wav": "undecodable audio",
        "gone.wav": "unreadable file",
        "wordless.wav": "no caption",
        "": "no path",
    }
    assert [record["line"] for record in summary.skipped] == [5, 6, 7, 8, 9, 10]
    assert list(map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())) == summary.skipped
    assert calls[-1] == (7, 7)  # the row without a path is not looked at
    assert calls == sorted(calls)
    bark, cat = read_shard(out / "train-000000.tar", 0, 2)
    assert (bark.key, cat.key) == ("dogs_Bark_1", "cat")
    assert len(open_clip(bark, 16000)[0]) == 16000
    assert open_clip(cat, 16000)[1]["captions"] == ["a cat", "it meows"]
    (tmp_path / "t.csv").write_text("audio,caption\ncat.flac,a cat\n")
    assert pack(tmp_path / "t.csv", sounds, out).skipped == []
    assert not (out / "quarantine.jsonl").exists()


@pytest.mark.parametrize("path", ["../secret.wav", "dogs/../../secret.wav", "{outside}", "link.wav", "a\\u0000b"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path, sounds: Path, path: str) -> None:
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, np.random.default_rng(0).uniform(-1, 1, 800), 8000)
    (sounds / "link.wav").symlink_to(secret)
    path = path.replace("{outside}", str(secret))
    good = '{"audio": "cat.flac", "caption": "a cat"}\n'
    (tmp_path / "t.jsonl").write_text(good + f'{{"audio": "{path}", "caption": "words"}}\n')
    with pytest.raises(InputError, match=r"line 2: .* leads out of"):
        pack(tmp_path / "t.jsonl", sounds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unusable_input_is_an_input_error(tmp_path: Path, sounds: Path) -> None:
    (tmp_path / "t.csv").write_text("audio,caption\nsilent.wav,x\nempty.wav,y\n")
    with pytest.raises(InputError, match=r"all 2 audio files of .* are bad, the first: silent audio"):
        pack(tmp_path / "t.csv", sounds, tmp_path / "out")
    with pytest.raises(InputError, match=r"split '\.\./x'"):
        pack(tmp_path / "t.csv", sounds, tmp_path / "out", split="../x")
    with pytest.raises(InputError, match="t has no rows"):
        pack_table([], Source(sounds), tmp_path / "out", PackSettings(), name="t", processes=1)


def test_shards_of_another_split_are_never_replaced(tmp_path: Path, sounds: Path) -> None:
    (tmp_path / "t.csv").write_text("audio,caption\ncat.flac,a cat\n")
    pack(tmp_path / "t.csv", sounds, out := tmp_path / "out")
    before = contents(out)
    with pytest.raises(InputError, match=r"1 tars that are no shards of the split 'test', such as train-000000\.tar"):
        pack(tmp_path / "t.csv", sounds, out, split="test")
    assert contents(out) == before
    pack(tmp_path / "t.csv", sounds, out, again=True)
    assert contents(out) == before


def test_keys_are_valid_unique_and_do_not_depend_on_the_order() -> None:
    names = [
        "a/b.wav",
        "a_b.wav",
        "a/b.flac",
        "ünï.wav",
        "é.wav",
        "plain-1.wav",
        "x" * 200 + ".wav",
        "x" * 200 + "y.wav",
    ]
    keys = make_keys(names)
    assert keys[5] == "plain-1"
    assert len(set(keys)) == len(keys)
    assert all(1 <= len(key) <= 80 and key.replace("-", "").replace("_", "").isascii() for key in keys)
    assert dict(zip(names, keys, strict=True)) == dict(zip(names[::-1], make_keys(names[::-1]), strict=True))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 recordings of noise, every fifth of them silent, and their table."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    lines = ["audio,caption,classes"]
    for number in range(40):
        noise = rng.uniform(-0.5, 0.5, RATE // 10) * (number % 5 != 4)
        soundfile.write(folder / f"{number}.wav", noise, RATE)
        lines.append(f"{number}.wav,noise number {number},noise;class {number % 3}")
    (folder / "t.csv").write_text("\n".join(lines))
    return folder


def test_order_and_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, recordings: Path) -> None:
    for processes in (1, 3):
        pack(recordings / "t.csv", recordings, tmp_path / str(processes), processes, clips_per_shard=7)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    shards = ShardList.load(tmp_path / "1")
    assert shards.counts == (6, 6, 5, 6, 5, 4)
    keys = [
        raw.key for path, count in zip(shards.paths, shards.counts, strict=True) for raw in read_shard(path, 0, count)
    ]
    assert keys == [str(number) for number in range(40) if number % 5 != 4]


def test_a_shard_ends_at_its_size_and_keeps_its_clips(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 200_000)
    soundfile.write(tmp_path / "a.wav", noise, RATE)
    for name in "bcde":
        (tmp_path / f"{name}.wav").hardlink_to(tmp_path / "a.wav")
    (tmp_path / "t.csv").write_text("audio,caption\n" + "".join(f"{name}.wav,noise\n" for name in "abcde"))
    pack(tmp_path / "t.csv", tmp_path, tmp_path / "out", sample_rate=0, shard_mib=1)
    assert ShardList.load(tmp_path / "out").counts == (3, 2)
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert sizes["sample_rate"] == RATE


def test_rates_and_channels_may_be_kept(tmp_path: Path, sounds: Path) -> None:
    (tmp_path / "t.csv").write_text("audio,caption\ndogs/Bark 1.wav,a dog\ncat.flac,a cat\n")
    pack(tmp_path / "t.csv", sounds, tmp_path / "out", sample_rate=0, keep_channels=True)
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert sizes["sample_rates"] == {"8000": 1, "44100": 1}
    bark, cat = read_shard(tmp_path / "out" / "train-000000.tar", 0, 2)
    read = [soundfile.read(io.BytesIO(raw.members["flac"])) for raw in (bark, cat)]
    assert [(samples.shape, rate) for samples, rate in read] == [((44100, 2), 44100), ((800,), 8000)]
    stereo, _ = soundfile.read(sounds / "dogs" / "Bark 1.wav")
    np.testing.assert_allclose(read[0][0], stereo, atol=1e-4)


@pytest.mark.parametrize("rate", [16000, 48000])
def test_flac_is_the_mean_of_the_channels_at_the_rate_asked_for(tmp_path: Path, rate: int) -> None:
    time = np.arange(44100) / 44100
    left, right = (0.8 * np.sin(2 * np.pi * hertz * time) for hertz in (440, 1000))
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 44100)
    (tmp_path / "t.csv").write_text("audio,caption\na.wav,two tones\n")
    pack(tmp_path / "t.csv", tmp_path, tmp_path / "out", sample_rate=rate)
    (raw,) = read_shard(tmp_path / "out" / "train-000000.tar", 0, 1)
    samples, found = soundfile.read(io.BytesIO(raw.members["flac"]))
    assert (samples.shape, found) == ((rate,), rate)
    loudness = np.abs(np.fft.rfft(samples)) * 2 / rate  # by Hz
    assert {int(hertz) for hertz in np.flatnonzero(loudness > 0.01)} == {440, 1000}
    np.testing.assert_allclose(loudness[[440, 1000]], 0.4, atol=0.005)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text())["sample_rate"] == rate


def test_original_files_are_stored_as_they_are(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44100)
    lines = ["audio,caption"]
    for name in ("a.wav", "b.flac", "c.ogg", "d.mp3", "e.aiff"):
        soundfile.write(tmp_path / name, noise, 44100)
        lines.append(f"{name},noise")
    (tmp_path / "a.wav").rename(tmp_path / "wrong.mp3")  # what counts is what is in it
    lines[1] = "wrong.mp3,noise"
    (tmp_path / "t.csv").write_text("\n".join(lines))
    summary = pack(tmp_path / "t.csv", tmp_path, tmp_path / "out", original=True)
    assert [(record["audio"], record["reason"][:4]) for record in summary.skipped] == [("e.aiff", "AIFF")]
    raws = list(read_shard(tmp_path / "out" / "train-000000.tar", 0, 4))
    for raw, extension, file in zip(
        raws, ("wav", "flac", "ogg", "mp3"), ("wrong.mp3", "b.flac", "c.ogg", "d.mp3"), strict=True
    ):
        assert raw.members[extension] == (tmp_path / file).read_bytes()
    assert json.loads((tmp_path / "out" / "sizes.json").read_text())["sample_rate"] == 44100


def claim_samples(flac: bytes, samples: int) -> bytes:
    """A FLAC file whose header says that it has so many samples: the last 36 bits of 8 bytes in STREAMINFO."""
    field = int.from_bytes(flac[18:26], "big") >> 36 << 36 | samples
    return flac[:18] + field.to_bytes(8, "big") + flac[26:]


def test_audio_and_captions_over_the_limits_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, RATE)
    soundfile.write(tmp_path / "good.flac", noise, RATE)
    soundfile.write(tmp_path / "long.flac", np.zeros(3 * 3600 * 100), 100)
    (tmp_path / "bomb.flac").write_bytes(claim_samples((tmp_path / "good.flac").read_bytes(), 2**36 - 1))
    with (tmp_path / "large.wav").open("wb") as file:
        file.truncate(129 * 2**20)
    soundfile.write(tmp_path / "none.wav", noise[:0], RATE)
    soundfile.write(tmp_path / "nan.wav", noise * np.nan, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.wav", noise * 1e20, RATE, subtype="FLOAT")
    (tmp_path / "cut.flac").write_bytes((tmp_path / "good.flac").read_bytes()[:5000])
    names = ["long.flac", "bomb.flac", "large.wav", "none.wav", "nan.wav", "loud.wav", "cut.flac"]
    table = "audio,caption_1,caption_2\n" + "".join(f"{name},words,\n" for name in names)
    table += "good.flac,words,{}\n".format("x" * 100_000)
    (tmp_path / "t.csv").write_bytes(table.encode() + b"good.flac,caf\xe9,\n")
    summary = pack(tmp_path / "t.csv", tmp_path, tmp_path / "out")
    assert [(record["audio"], record["reason"].split(":")[0]) for record in summary.skipped] == [
        ("long.flac", "too long"),
        ("bomb.flac", "too long"),
        ("large.wav", "too large"),
        ("none.wav", "empty audio"),
        ("nan.wav", "NaN or infinite audio"),
        ("loud.wav", "too loud"),
        ("cut.flac", "undecodable audio"),
        ("good.flac", "a caption of 100000 characters, at most 10000 are taken"),
        ("good.flac", "a caption that is not UTF-8"),
    ]
    assert summary.clips == 1
    (good,) = read_shard(tmp_path / "out" / "train-000000.tar", 0, 1)
    assert open_clip(good, RATE)[1]["captions"] == ["words"]


@pytest.mark.parametrize("original", [False, True])
def test_a_wav_that_is_cut_is_named_and_a_stream_without_a_size_is_not(tmp_path: Path, original: bool) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 801)
    soundfile.write(tmp_path / "whole.wav", noise, RATE, subtype="PCM_U8")  # an odd number of bytes
    whole = (tmp_path / "whole.wav").read_bytes()
    start = whole.index(b"data") + 8
    for number, size in enumerate((0x7FFFF000, 0xFFFFFFFF)):  # as SoX and FFmpeg write into pipes
        stream = whole[: start - 4] + size.to_bytes(4, "little") + whole[start:]
        (tmp_path / f"stream{number}.wav").write_bytes(stream[:-100])
    noted = whole[: start - 8] + b"note" + (3).to_bytes(4, "little") + b"abc\0" + whole[start - 8 :]
    for name, data in (("noted", noted), ("cut", whole[:-2]), ("noted_and_cut", noted[: len(noted) // 2])):
        (tmp_path / f"{name}.wav").write_bytes(data)
    names = ["whole", "noted", "stream0", "stream1", "cut", "noted_and_cut"]
    (tmp_path / "t.csv").write_text("audio,caption\n" + "".join(f"{name}.wav,noise\n" for name in names))
    summary = pack(tmp_path / "t.csv", tmp_path, tmp_path / "out", original=original)
    assert [(record["audio"], record["reason"]) for record in summary.skipped] == [
        ("cut.wav", "truncated WAV: 800 of 801 bytes of sound"),
        ("noted_and_cut.wav", f"truncated WAV: {len(noted) // 2 - start - 12} of 801 bytes of sound"),
    ]


def test_a_loop_of_links_costs_its_row(tmp_path: Path, sounds: Path) -> None:
    (sounds / "one.wav").symlink_to(sounds / "two.wav")
    (sounds / "two.wav").symlink_to(sounds / "one.wav")
    (tmp_path / "t.csv").write_text("audio,caption\none.wav,words\ncat.flac,a cat\none.wav/x.wav,words\n")
    summary = pack(tmp_path / "t.csv", sounds, tmp_path / "out")
    assert summary.clips == 1
    reason = "unreadable file: a loop of links"
    assert [(record["line"], record["reason"]) for record in summary.skipped] == [(2, reason), (4, reason)]


def test_captions_that_are_too_much_together_are_named(tmp_path: Path, sounds: Path) -> None:
    def row(audio: str, captions: int) -> str:
        return json.dumps({"audio": audio, "captions": [f"{n:0>9000}" for n in range(captions)]}) + "\n"

    (tmp_path / "t.jsonl").write_text(row("cat.flac", 110) + row("wordless.wav", 150))
    summary = pack(tmp_path / "t.jsonl", sounds, tmp_path / "out")
    reason = f"its .json has {150 * 9004 + 29} bytes, over the limit of 1 MiB"
    assert summary.skipped == [{"line": 2, "audio": "wordless.wav", "reason": reason}]
    (raw,) = read_shard(tmp_path / "out" / "train-000000.tar", 0, 1)
    assert len(open_clip(raw, RATE)[1]["captions"]) == 110


def test_a_file_that_two_rows_reach_is_packed_once(tmp_path: Path, sounds: Path) -> None:
    (sounds / "link.flac").symlink_to(sounds / "cat.flac")
    (tmp_path / "t.csv").write_text("audio,caption\ncat.flac,a cat\nlink.flac,it meows\n")
    summary = pack(tmp_path / "t.csv", sounds, tmp_path / "out")
    assert summary.clips == 1
    assert summary.skipped == [{"line": 3, "audio": "link.flac", "reason": "the same file as line 2"}]


def test_urls_of_other_kinds_are_refused(tmp_path: Path, sounds: Path) -> None:
    for url in ("file:///etc/passwd", "simplecache::http://host/x.wav", "http://host/x::file:///y"):
        (tmp_path / "t.csv").write_text(f"audio,caption\n{url},words\n")
        with pytest.raises(InputError, match=r"line 2: .*(is not read|leads out)|all 1 audio files"):
            pack(tmp_path / "t.csv", sounds, tmp_path / "out")


def test_what_is_packed_already_is_kept_until_asked(tmp_path: Path, recordings: Path) -> None:
    first = pack(recordings / "t.csv", recordings, tmp_path, clips_per_shard=7)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = pack(recordings / "t.csv", recordings, tmp_path, clips_per_shard=7)
    assert (first.kept, second.kept) == (0, 40)
    assert (second.clips, second.skipped) == (first.clips, first.skipped)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    third = pack(recordings / "t.csv", recordings, tmp_path, clips_per_shard=7, again=True)
    assert third.kept == 0
    assert contents(tmp_path) == before
    assert pack(recordings / "t.csv", recordings, tmp_path, clips_per_shard=8).kept == 0
    assert len(ShardList.load(tmp_path).counts) == 5


def test_urls_are_packed_in_the_order_of_the_table_and_failures_named(tmp_path: Path, recordings: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(recordings))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        names = ["gone.wav", *(f"{number}.wav" for number in range(30))]
        lines = [json.dumps({"audio": f"{address}/{name}", "caption": f"noise {name}"}) for name in names]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        summary = pack(tmp_path / "t.jsonl", tmp_path, tmp_path / "out", processes=2, clips_per_shard=20)
        server.shutdown()
    reasons = {record["audio"].rsplit("/")[-1]: record["reason"].split(":")[0] for record in summary.skipped}
    assert reasons == {"gone.wav": "unreadable URL"} | {f"{number}.wav": "silent audio" for number in range(4, 30, 5)}
    first, second = (raw.members["flac"] for raw in read_shard(tmp_path / "out" / "train-000000.tar", 0, 2))
    for number, flac in enumerate((first, second)):
        expected, _ = soundfile.read(recordings / f"{number}.wav")
        np.testing.assert_allclose(soundfile.read(io.BytesIO(flac))[0], expected, atol=1e-4)


def test_what_was_out_of_reach_is_tried_again_and_comes_behind_the_rest(tmp_path: Path, recordings: Path) -> None:
    names = ["gone.wav", *(f"{number}.wav" for number in range(14))]
    settings, out = PackSettings(sample_rate=RATE, clips_per_shard=4), tmp_path / "out"
    with serving(recordings) as server:
        rows = [Row(n, f"{server.url}/{name}", ["noise"], [f"kind {n % 2}"]) for n, name in enumerate(names)]

        def call(faults: dict[str, list[str]], **options: Any) -> PackSummary:
            server.faults = faults
            return pack_table(rows, Source(tmp_path, tries=1), out, settings, processes=1, **options)

        def interrupt(done: int, total: int) -> None:
            if done > 12:  # the first four of the seven are packed
                raise KeyboardInterrupt

        away = [f"/{number}.wav" for number in (0, 1, 2, 4, 6, 11, 12)]
        first = call({path: ["503"] for path in away})
        before = contents(out)
        assert (first.clips, first.shards, first.lost, first.kept) == (6, 3, 7, 0)
        with pytest.raises(KeyboardInterrupt):
            call({"/6.wav": ["503"], "/11.wav": ["503"]}, progress=interrupt)
        assert ShardList.load(out).clips == 6
        second = call({"/6.wav": ["503"], "/11.wav": ["503"]})
        assert (second.clips, second.shards, second.lost) == (10, 5, 2)
        assert second.kept in (12, 15)
        third = call({"/6.wav": ["503"], "/11.wav": ["503"]})
        assert (third.clips, third.shards, third.lost, third.kept) == (10, 5, 2, 13)
        last = call({})
        asked = server.requests.copy()
        assert call({}) == dataclasses.replace(last, kept=15)
        assert server.requests == asked  # nothing is left that another try may get
        assert asked["/gone.wav"] == 1
    assert (last.clips, last.shards, last.lost) == (12, 6, 0)
    assert sum(last.classes.values()) == 12
    assert [record["audio"].rpartition("/")[2] for record in last.skipped] == ["gone.wav", "4.wav", "9.wav"]
    assert list(map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())) == last.skipped
    after = contents(out)
    assert all(after[name] == before[name] for name in before if name.endswith(".tar"))
    shards = ShardList.load(out)
    keys = [raw.key for number, count in enumerate(shards.counts) for raw in read_clips(shards, number, 0, count)]
    assert len(set(keys)) == 12
    assert not verify(out, decode=True, processes=1)


def test_two_calls_never_pack_into_one_folder_at_once(tmp_path: Path, recordings: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(InputError, match=r"^another ask-dist pack writes into .*out: let it end, or give another"):
            pack(recordings / "t.csv", recordings, out, again=True)

    assert pack(recordings / "t.csv", recordings, out, progress=meanwhile).clips == 32
    assert pack(recordings / "t.csv", recordings, out, again=True).clips == 32


COMMAND = """
import sys
from ask_dist.cli import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def test_after_a_sigkill_the_next_call_goes_on_and_no_process_is_left(tmp_path: Path, recordings: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * 44100)
    lines = ["audio,caption"]
    for number in range(60):
        soundfile.write(tmp_path / f"{number}.wav", np.roll(noise, number), 44100)
        lines.append(f"{number}.wav,noise number {number}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    (tmp_path / "command.py").write_text(COMMAND)
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["pack", tmp_path / "t.csv", out, "--clips-per-shard", "2", "--processes", "2", "--sample-rate", "0"]
    command = [sys.executable, str(tmp_path / "command.py"), *map(str, arguments)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}) as process:
        while len(list(out.glob(".packing/[0-9]*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert children
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert not (out / "sizes.json").exists()
    done = len(list(out.glob(".packing/[0-9]*.json")))
    assert 3 <= done < 30
    (out / ".packing" / "000029-0000.tar").write_bytes(b"half a shard")
    calls: list[int] = []
    options: dict[str, Any] = {"clips_per_shard": 2, "sample_rate": 0}
    summary = pack(tmp_path / "t.csv", tmp_path, out, progress=lambda done, _: calls.append(done), **options)
    assert (summary.kept, summary.clips) == (2 * done, 60)
    assert calls[0] >= 2 * done
    pack(tmp_path / "t.csv", tmp_path, whole, **options)
    assert contents(out) == contents(whole)


def test_keys_may_have_a_prefix_and_come_from_urls() -> None:
    names = ["https://host.org/a/x.wav?size=1", "https://host.org/a/x.wav?size=2", "s3://bucket/b/y.flac", "z.wav"]
    keys = make_keys(names, "web-")
    assert keys[2:] == ["web-bucket_b_y", "web-z"]
    assert all(key.startswith("web-host_org_a_x-") for key in keys[:2])
    assert keys[0] != keys[1]
