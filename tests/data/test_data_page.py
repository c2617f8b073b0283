"""What docs/data.md types for published corpora, in its order, on tiny downloads, up to the job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist import cli
from ask_dist.data.shards import ShardList
from tests.test_readme import ROOT, blocks, commands

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(900)]
PAGE = ROOT / "docs" / "data.md"
SMALL = [
    *("optimization.micro_batch_size=8", "model.embedding_dim=16", "model.audio.width=8", "model.text.width=16"),
    *("data.clip_seconds=0.5", "data.loader_processes=0", "data.lanes=2", "cluster.num_workers=1"),
]
VIDEOS = [f"video-{number:05d}" for number in range(60)]  # as many characters as YouTube's ids have
CAPTIONS = ",".join(f"caption_{number}" for number in range(1, 6))


def record(folder: Path, names: list[str]) -> None:
    """Half a second of noise in each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(folder.as_posix()))
    for name in names:
        soundfile.write(folder / name, rng.uniform(-0.5, 0.5, 8000), 16000)


def write(path: str, *lines: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


def download() -> None:
    """Tables as they are published, and a recording for each row. WavCaps has a video of AudioCaps' test and a sound of
    Clotho's."""
    record(Path("audiocaps/audio"), [f"{video}_30.wav" for video in VIDEOS[:40]])
    for split, videos in {"train": VIDEOS[:24], "val": VIDEOS[24:32], "test": VIDEOS[32:40]}.items():
        rows = [f"{number},{video},30,a noise {number}" for number, video in enumerate(videos)]
        write(f"audiocaps/{split}.csv", "audiocap_id,youtube_id,start_time,caption", *rows)
    sources = {"FreeSound": "fsd", "AudioSet_SL": "as", "BBC_Sound_Effects": "bbc", "SoundBible": "sb"}
    ids = {source: [str(number) for number in range(1, 11)] for source in sources}
    ids["AudioSet_SL"] = [f"Y{video}.wav" for video in VIDEOS[39:50]]
    for source, table in sources.items():
        record(Path("Zip_files", source, "mnt"), [f"{name.removesuffix('.wav')}.flac" for name in ids[source]])
        data = [{"id": name, "caption": f"{table} {name}"} for name in ids[source]]
        write(f"json_files/{source}/{table}_final.json", json.dumps({"data": data}))
    banned = {"FreeSound": ["1"], "AudioSet": [f"Y{VIDEOS[49]}.wav"]}
    write("json_files/blacklist/blacklist_exclude_all_ac.json", json.dumps(banned))
    for split in ("development", "validation", "evaluation"):
        names = [f"{split} {number}.wav" for number in range(8)]
        record(Path(split), names)
        write(f"clotho_captions_{split}.csv", f"file_name,{CAPTIONS}", *(f"{name},a,b,c,d,e" for name in names))
        told = [f"{name},noise,{10 + number}" for number, name in enumerate(names)]
        write(f"clotho_metadata_{split}.csv", "file_name,keywords,sound_id", *told)
    record(Path("audioset"), [f"Y{video}.wav" for video in VIDEOS[20:40]])
    write("AudioSetCaps_caption.csv", "id,caption", *(f"Y{video},a noise" for video in VIDEOS[20:40]))
    record(Path("ESC-50/audio"), [f"1-{number}-A-0.wav" for number in range(10)])
    write("ESC-50/meta/esc50.csv", "filename,fold,category", *(f"1-{number}-A-0.wav,1,dog" for number in range(10)))


def test_each_command_for_a_published_corpus_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    download()
    section = PAGE.read_text().split("## Published corpora")[1].split("## What packing does")[0]
    for name, text in zip(("mine.yaml", "wavcaps.yaml"), blocks(PAGE, "yaml"), strict=False):
        write(name, text)
    lines = [
        words
        for text in blocks(PAGE, "shell")
        if text in section
        for words in commands(text)
        if words[0] == "ask-dist" and words[1] in ("pack", "shards")
    ]
    for words in [*lines, *(["ask-dist", "check", f"{name}.yaml", *SMALL] for name in ("mine", "wavcaps"))]:
        with pytest.raises(SystemExit) as stop:
            cli.main([*words[1:], *(["--processes", "1"] if words[1] == "pack" else [])])
        assert not stop.value.code, f"{words}: {capsys.readouterr()}"
    sizes = Path("shards").rglob("sizes.json")
    counts = {str(path.parent.relative_to("shards")): ShardList.load(path.parent).clips for path in sizes}
    assert counts == {
        "audiocaps/train": 24,
        "audiocaps/validation": 8,
        "audiocaps/test": 8,
        "wavcaps/freesound": 9,
        "wavcaps/audioset": 10,
        "wavcaps/bbc": 10,
        "wavcaps/soundbible": 10,
        "clotho/train": 8,
        "clotho/validation": 8,
        "clotho/test": 8,
        "audiosetcaps/train": 4,
        "esc50/test": 10,
    }
    warned = " ".join(capsys.readouterr().out.split())
    assert f"its recording, youtube:{VIDEOS[39]}, is in test as audiocaps-{VIDEOS[39]}_30" in warned
    assert "its recording, freesound:10, is in held_out as clotho-evaluation_0" in warned
