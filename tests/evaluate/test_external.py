"""A bank of another corpus: built by a run's model, looked into, checked, searched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from rich.console import Console

from ask_dist.bank import store
from ask_dist.data.pack import write_shards
from ask_dist.data.quarantine import QUARANTINE
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.shards import Clip, ShardList, stable_id
from ask_dist.errors import InputError
from ask_dist.evaluate import encode, external
from ask_dist.models.saved import load_model
from tests.finished_run import RATE, noise_corpus, untrained_run

CLIPS = 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_corpus(tmp_path_factory.mktemp("corpus") / "train", CLIPS)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("runs") / "noise", corpus)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def test_a_row_a_clip_as_the_model_embeds_it(corpus, run, tmp_path, console, monkeypatch):
    monkeypatch.setattr(external, "PART", 7)  # four parts, the last of another size
    external.build(run, corpus, tmp_path / "bank", console)
    state = store.load(tmp_path / "bank")
    assert set(state["ids"].tolist()) == {stable_id(f"clip-{number:02d}") for number in range(CLIPS)}
    assert set(state["step"].tolist()) == {0}
    _, model = load_model(run)
    row = state["ids"].tolist().index(stable_id("clip-05"))
    with torch.no_grad():
        texts = model.encode_text(model.text.tokenize(["noise number 5", "the\u2028noise 5"]))
    mean = torch.nn.functional.normalize(texts.sum(dim=0), dim=0)
    np.testing.assert_allclose(state["text"][row].astype(np.float32), mean.numpy(), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(state["audio"].astype(np.float32), axis=1), 1, atol=2e-3)


def test_a_sound_of_the_corpus_finds_itself_and_a_caption_its_text(corpus, run, tmp_path, console):
    bank = tmp_path / "bank"
    external.build(run, corpus, bank, console)
    rng = np.random.default_rng(0)
    sound = [rng.normal(scale=0.1, size=RATE // 2).astype(np.float32) for _ in range(4)][3]
    soundfile.write(tmp_path / "noise.flac", sound, RATE)
    external.search(bank, run, None, tmp_path / "noise.flac", 1, "audio", console)
    external.search(bank, run, "noise number 4", None, 1, "text", console)
    shown = console.export_text()
    assert "clip-03" in shown
    assert "clip-04" in shown
    (bank / external.CLIPS).unlink()
    external.search(bank, run, "noise number 4", None, 1, "text", console)
    assert f"id {stable_id('clip-04')}" in console.export_text()


def test_snapshots_are_told_and_checked(corpus, run, tmp_path, console):
    bank = tmp_path / "bank"
    for _ in range(2):
        external.build(run, corpus, bank, console)
    external.inspect(bank, console)
    external.verify(bank, console)
    shown = console.export_text()
    assert shown.count("snapshot-00000000") == 4
    assert shown.count(f"{CLIPS} rows, every checksum right") == 2
    data = bank / "snapshot-000000001.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"snapshot-000000001\.safetensors has \d+ bytes"):
        external.verify(bank, console)
    (bank / "snapshot-000000000.json").write_text("{}")
    external.inspect(bank, console)
    assert "damaged" in console.export_text()


def test_a_damaged_shard_costs_its_own_clips_alone(corpus, run, tmp_path, console, monkeypatch):
    monkeypatch.setattr(external, "PART", 5)  # two parts a shard: both of the damaged one are wholly bad
    hurt = tmp_path / "hurt"
    shutil.copytree(corpus, hurt)
    (shard, *_) = sorted(hurt.glob("*.tar"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    external.build(run, hurt, tmp_path / "bank", console)
    assert len(store.load(tmp_path / "bank")["ids"]) == CLIPS - 10
    assert "10 clips left out, 0 of them because they are held out" in console.export_text()
    (reason,) = named(tmp_path / "bank").values()
    assert "the shard has 0 clips that can be read" in reason
    for other in hurt.glob("*.tar"):
        other.write_bytes(b"\0" * other.stat().st_size)
    with pytest.raises(InputError):
        external.build(run, hurt, tmp_path / "none", console)
    assert not (tmp_path / "none").exists()


def test_what_does_not_belong_together_is_refused(corpus, run, tmp_path, console):
    bank = tmp_path / "bank"
    with pytest.raises(InputError, match="holds no bank"):
        external.inspect(bank, console)
    with pytest.raises(InputError, match="holds no readable bank"):
        external.search(bank, run, "noise", None, 1, "text", console)
    external.build(run, corpus, bank, console)
    with pytest.raises(InputError, match="one of the two"):
        external.search(bank, run, None, None, 1, "text", console)
    (bank / external.CLIPS).write_text('{"id": "five"}\n')
    with pytest.raises(InputError, match=r"clips\.jsonl is damaged"):
        external.search(bank, run, "noise", None, 1, "text", console)
    external.build(run, corpus, bank, console)  # the remedy that it names
    external.search(bank, run, "noise", None, 1, "text", console)
    state = store.load(bank)
    store.save(bank, state | {name: np.repeat(state[name], 2, axis=1) for name in ("audio", "text")})
    with pytest.raises(InputError, match="rows of width 64"):
        external.search(bank, run, "noise", None, 1, "text", console)


@pytest.mark.parametrize("part", [1, 1000])
def test_clips_that_the_run_is_tested_on_stay_out(corpus, run, tmp_path, console, monkeypatch, part):
    monkeypatch.setattr(external, "PART", part)
    test = tmp_path / "test"
    write_shards(
        [
            Clip(
                "clip-03", np.random.default_rng(9).normal(scale=0.1, size=800).astype(np.float32), RATE, ("a noise",)
            ),
            *(Clip(f"of-{key}", audio, RATE, ("a noise",)) for key, audio in sounds_of(corpus, "clip-20")),
        ],
        test,
        "test",
    )
    tested = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((tested / "config.yaml").read_text())
    config["data"] |= {"test": str(test), "validation": str(tmp_path / "gone")}
    (tested / "config.yaml").write_text(yaml.safe_dump(config))
    external.build(tested, corpus, tmp_path / "bank", console)
    ids = set(store.load(tmp_path / "bank")["ids"].tolist())
    assert ids == {stable_id(f"clip-{number:02d}") for number in range(CLIPS) if number not in (3, 20)}
    assert "28 rows in " in (shown := console.export_text())
    assert "2 clips left out, 2 of them because they are held out" in shown
    assert named(tmp_path / "bank") == {
        "clip-03": "held out: its key is in test",
        "clip-20": "held out: the same sound is in test as of-clip-20",
    }
    assert {clip.key for clip in external.banked_clips(tmp_path / "bank").values() if clip.sound} == {
        f"clip-{number:02d}" for number in range(CLIPS) if number not in (3, 20)
    }


def test_so_do_other_cuts_of_their_recordings(run, tmp_path, console):
    rng = np.random.default_rng(11)
    cuts = [
        Clip(
            f"cut-{number}",
            rng.normal(scale=0.1, size=800).astype(np.float32),
            RATE,
            ("a cut",),
            (),
            {"recording": name},
        )
        for number, name in enumerate(("youtube:aaaaaaaaaaa", "freesound:7", "freesound:7"))
    ]
    write_shards(cuts[:2], tmp_path / "new", "train")
    write_shards(cuts[2:], tmp_path / "test", "test")
    tested = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((tested / "config.yaml").read_text())
    config["data"] |= {"test": str(tmp_path / "test")}
    (tested / "config.yaml").write_text(yaml.safe_dump(config))
    external.build(tested, tmp_path / "new", tmp_path / "bank", console)
    (kept,) = external.banked_clips(tmp_path / "bank").values()
    assert (kept.key, kept.recording) == ("cut-0", "youtube:aaaaaaaaaaa")
    assert named(tmp_path / "bank") == {"cut-1": "held out: its recording, freesound:7, is in test as cut-2"}


@pytest.mark.parametrize("fingerprints", [False, True])
def test_so_do_clips_that_sound_like_them_where_fingerprints_are_compared(corpus, run, tmp_path, console, fingerprints):
    rng = np.random.default_rng(10)
    sounds = [rng.normal(scale=0.1, size=2 * RATE).astype(np.float32) for _ in range(4)]
    write_shards(
        [Clip(f"new-{n}", audio, RATE, (f"new {n}",)) for n, audio in enumerate(sounds)], tmp_path / "new", "train"
    )
    write_shards([Clip("tested", 0.3 * sounds[2][999:], RATE, ("a noise",))], tmp_path / "test", "test")
    tested = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((tested / "config.yaml").read_text())
    config["data"] |= {"test": str(tmp_path / "test"), "fingerprints": fingerprints}
    (tested / "config.yaml").write_text(yaml.safe_dump(config))
    external.build(tested, tmp_path / "new", tmp_path / "bank", console)
    left_out = {"new-2": "held out: it sounds like test as tested"} if fingerprints else {}
    keys = {clip.key for clip in external.banked_clips(tmp_path / "bank").values()}
    assert keys == {f"new-{number}" for number in range(4)} - left_out.keys()
    if fingerprints:
        assert named(tmp_path / "bank") == left_out
        assert "1 clips left out, 1 of them because they are held out" in console.export_text()


def test_captions_that_the_run_is_tested_on_stay_out(corpus, run, tmp_path, console):
    sound = np.random.default_rng(9).normal(scale=0.1, size=800).astype(np.float32)
    write_shards([Clip("tested", sound, RATE, ("Noise number 2.", "a noise"))], tmp_path / "test", "test")
    tested, bank = shutil.copytree(run, tmp_path / "run"), tmp_path / "bank"
    config = yaml.safe_load((tested / "config.yaml").read_text())
    config["data"] |= {"test": str(tmp_path / "test")}
    (tested / "config.yaml").write_text(yaml.safe_dump(config))
    written = tmp_path / "captions.txt"
    written.write_text("noise number 1\nnoise number 2\nA NOISE\nnoise number 22\n")
    external.build(tested, written, bank, console)
    assert {clip.captions for clip in external.banked_clips(bank).values()} == {
        ("noise number 1",),
        ("noise number 22",),
    }
    assert "2 rows in " in (shown := console.export_text())
    assert "2 clips left out, 2 of them because they are held out" in shown
    reason = "held out: the same caption is in test as tested"
    assert named(bank) == {"caption:noise number 2": reason, "caption:A NOISE": reason}
    external.build(tested, corpus, tmp_path / "clips", console)  # beside a sound of its own it stays
    assert len(store.load(tmp_path / "clips")["ids"]) == CLIPS
    written.write_text("a noise")
    with pytest.raises(InputError, match=r"every caption of captions\.txt is held out, .* name others$"):
        external.build(tested, written, tmp_path / "none", console)
    assert not (tmp_path / "none").exists()


def named(bank: Path) -> dict[str, str]:
    """The reasons by the keys of what a bank folder left out."""
    records = map(json.loads, (bank / QUARANTINE).read_text().splitlines())
    return {record["key"]: record["reason"] for record in records}


def sounds_of(corpus: Path, *keys: str) -> list[tuple[str, np.ndarray]]:
    raws = (raw for path in ShardList.load(corpus).paths for raw in read_shard(path, 0, 10))
    return [(raw.key, open_clip(raw, RATE)[0]) for raw in raws if raw.key in keys]


def test_captions_become_rows_without_audio(run, tmp_path, console, monkeypatch):
    monkeypatch.setattr(external, "PART", 3)
    monkeypatch.setattr(encode, "TEXTS", 2)
    written, bank = tmp_path / "captions.txt", tmp_path / "bank"
    written.write_text("\n".join(f"noise number {number % 8}" for number in range(12)))
    external.build(run, written, bank, console)
    state = store.load(bank)
    np.testing.assert_array_equal(state["audio"], 0.0)
    assert set(state["ids"].tolist()) == {stable_id(f"caption:noise number {number}") for number in range(8)}
    _, model = load_model(run)
    with torch.no_grad():
        wanted = model.encode_text(model.text.tokenize(["noise number 5"]))[0]
    row = state["ids"].tolist().index(stable_id("caption:noise number 5"))
    np.testing.assert_allclose(state["text"][row].astype(np.float32), wanted.numpy(), atol=2e-3)
    external.search(bank, run, "noise number 4", None, 1, "text", console)
    assert "captions.txt: caption:noise number 4" in console.export_text()
    with pytest.raises(InputError, match="holds captions alone"):
        external.search(bank, run, "noise number 4", None, 1, "audio", console)
