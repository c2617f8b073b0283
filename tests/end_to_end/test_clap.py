"""What docs/training.md types from CLAP and WavCaps to an exported model, in its order, on tiny downloads."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.end_to_end.command import ask_dist
from tests.models.conftest import needs_pretrained
from tests.models.towers import save_clap
from tests.test_readme import blocks, commands

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PAGE, OTHER = ROOT / "docs" / "training.md", ROOT / "docs" / "encoders.md"
PAGES = (PAGE, OTHER)
HEADING = "## From CLAP and WavCaps to a model of your own"
RATE = 8000
# What a ClapModel of 12 dimensions that hears two seconds at 8 kHz needs, and a run of a few steps.
MODEL = ["data.sample_rate=8000", "data.clip_seconds=1.0", "model.embedding_dim=12", "model.text.max_tokens=16"]
SMALL = [
    *MODEL,
    *("data.loader_processes=0", "cluster.dashboard=false", "cluster.num_workers=1", "optimization.micro_batch_size=8"),
    *("optimization.epochs=3", "optimization.evaluate_every=2", "knowledge.neighbours=4"),
    *("knowledge.reliability.rank=4", "bank.prototypes=[4]", "refine.minimum_fresh=8", "refine.interval=0.1"),
]
OPTIONS = {"pack": ["--clips-per-shard", "6", "--processes", "1"], "check": SMALL, "train": SMALL}
WORDS = ["dog", "rain", "drum", "viola"]


def record(folder: Path, names: list[str]) -> None:
    """Recordings of a second, a tone for each word."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, time = np.random.default_rng(len(names)), np.arange(RATE) / RATE
    for number, name in enumerate(names):
        pitch = 150.0 * 2.0 ** (number % len(WORDS)) * rng.uniform(0.97, 1.03)
        soundfile.write(folder / name, 0.4 * np.sin(2 * np.pi * pitch * time), RATE)


def caption(number: int) -> str:
    return f"a loud {WORDS[number % len(WORDS)]} then {number // len(WORDS)} notes"


def download(folder: Path) -> None:
    """CLAP, and tables and recordings as they are published."""
    save_clap(folder / "clap")
    sources = {"FreeSound": "fsd", "AudioSet_SL": "as", "BBC_Sound_Effects": "bbc", "SoundBible": "sb"}
    for source, table in sources.items():
        ids = [f"{table}{number}" for number in range(13)]
        record(folder / "Zip_files" / source / "mnt", [f"{name}.flac" for name in ids])
        data = [{"id": name, "caption": caption(number)} for number, name in enumerate(ids)]
        (folder / "json_files" / source).mkdir(parents=True)
        (folder / "json_files" / source / f"{table}_final.json").write_text(json.dumps({"data": data}))
    (folder / "json_files" / "blacklist").mkdir()
    banned = {"FreeSound": ["fsd12"], "AudioSet": ["as12"]}
    (folder / "json_files" / "blacklist" / "blacklist_exclude_all_ac.json").write_text(json.dumps(banned))
    for split in ("validation", "evaluation"):
        names = [f"{split} {number}.wav" for number in range(8)]
        record(folder / "clotho" / split, names)
        lines = ["file_name," + ",".join(f"caption_{n}" for n in range(1, 6))]
        lines += [f"{name}," + ",".join(f"{caption(n)} {take}" for take in range(5)) for n, name in enumerate(names)]
        (folder / "clotho" / f"clotho_captions_{split}.csv").write_text("\n".join(lines) + "\n")
        told = ["file_name,keywords,sound_id", *(f"{name},tone,{n}" for n, name in enumerate(names))]
        (folder / "clotho" / f"clotho_metadata_{split}.csv").write_text("\n".join(told) + "\n")
    record(folder / "audiocaps" / "audio", [f"video{number}_30.wav" for number in range(8)])
    rows = [f"{number},video{number},30,{caption(number)}" for number in range(8)]
    header = "audiocap_id,youtube_id,start_time,caption"
    (folder / "audiocaps" / "test.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the downloads and the configurations."""
    needs_pretrained()
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", folder / "configs")
    download(folder)
    return folder


def section() -> str:
    return PAGE.read_text().split(HEADING)[1]


def typed() -> list[list[str]]:
    """Its command lines, as words."""
    return [words for block in blocks(PAGE, "shell") if block in section() for words in commands(block)]


@pytest.fixture
def in_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    return checkout


def test_each_command_runs_and_the_export_is_what_the_run_was(in_checkout: Path) -> None:
    done = []
    for words in typed():
        if words[0] == "ask-dist":
            result = ask_dist(*words[1:], *OPTIONS.get(words[1], []))
            assert result.returncode == 0, f"{shlex.join(words)}: {result.stdout[-2000:]} {result.stderr[-2000:]}"
            done.append(words[1])
    assert done == [
        *["pack"] * 7,
        *("shards", "shards", "check", "train", "train", "evaluate", "evaluate", "search", "export", "export"),
    ]
    for source in ("freesound", "audioset"):
        refused = Path("shards/wavcaps", source, "quarantine.jsonl").read_text()
        assert "in blacklist_exclude_all_ac.json" in refused
    knowing, plain = (json.loads(Path("runs", name, "report.json").read_text()) for name in ("clap", "clap-plain"))
    assert knowing["bank"]["rows"] == 50  # 4 x 13 recordings but for two in the blacklist
    assert "bank" not in plain or not plain["bank"]
    assert json.loads(Path("audiocaps.json").read_text())["text_to_audio"]["R@10"] > 0
    names: dict[str, object] = {}
    (block,) = [block for block in blocks(PAGE, "python") if block in section()]
    exec(compile(block, str(PAGE), "exec"), names)
    audio, text = exported(names["model"], names["processor"])
    assert audio.shape == text.shape == (1, 12)
    assert float((audio - tuned_from(Path("clap"))).abs().max()) > 1e-4  # it learned


def test_what_both_pages_train_by_the_same_configuration_is_checked(in_checkout: Path) -> None:
    for split, source in (("train", "wavcaps/bbc"), ("validation", "clotho/validation"), ("test", "clotho/test")):
        shutil.copytree(f"shards/{source}", f"shards/mine/{split}")  # of the test before
    ours = [words for page in PAGES for block in blocks(page, "shell") for words in commands(block)]
    ours = [words for words in ours if words[1:3] == ["train", "configs/clap.yaml"] and len(words) > 3]
    assert len(ours) == 6
    for words in ours:
        result = ask_dist("check", *words[2:], *SMALL)
        assert result.returncode == 0, f"{shlex.join(words)}: {result.stdout[-2000:]} {result.stderr[-2000:]}"


def exported(model: object, processor: object) -> tuple[torch.Tensor, torch.Tensor]:
    heard, rate = soundfile.read("audiocaps/audio/video0_30.wav", dtype="float32")
    sound = processor.feature_extractor([heard], sampling_rate=rate, return_tensors="pt")
    words = processor.tokenizer([caption(0)], padding=True, return_tensors="pt")
    with torch.no_grad():
        given = model(words["input_ids"], sound["input_features"].float(), attention_mask=words["attention_mask"])
    return given.audio_embeds, given.text_embeds


def tuned_from(folder: Path) -> torch.Tensor:
    from transformers import ClapModel, ClapProcessor

    return exported(ClapModel.from_pretrained(folder).eval(), ClapProcessor.from_pretrained(folder))[0]


def test_the_job_for_a_cluster_trains_where_the_shards_are(in_checkout: Path, cluster: dict[str, str]) -> None:
    assert Path("shards/wavcaps").is_dir()  # of the test before
    (words,) = [words for words in typed() if words[0] == "ray"]
    words = [word.replace("/shared", str(in_checkout)) for word in words]
    words[words.index("--address") + 1] = cluster["RAY_API_SERVER_ADDRESS"]
    words[words.index("--working-dir") + 1] = str(ROOT)
    words[words.index("python")] = sys.executable
    command = [str(Path(sys.executable).with_name("ray")), *words[1:], *SMALL, "name=clap-job"]
    done = subprocess.run(command, env=os.environ | cluster, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((in_checkout / "runs" / "clap-job" / "report.json").read_text())
    assert report["throughput"]["samples_seen"] == 150
