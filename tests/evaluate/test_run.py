"""What is done with a finished run: its shards are read as the run read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from rich.console import Console

from ask_dist.data.audio import fit_length
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip, ShardList
from ask_dist.errors import InputError
from ask_dist.evaluate import external
from ask_dist.evaluate.encode import encode, search_index
from ask_dist.evaluate.run import embed_query, evaluate, search
from ask_dist.models.saved import load_model
from tests.data.server import serving
from tests.finished_run import RATE, noise_corpus, untrained_run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return noise_corpus(tmp_path / "noise", 12)


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return untrained_run(tmp_path / "run", corpus)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def configure(run: Path, **data: object) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"] |= data
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


def test_shards_behind_urls_are_kept_in_the_cache_of_the_run(corpus, run, tmp_path, console):
    with serving(corpus) as server:
        configure(run, train=server.url, cache_dir=str(tmp_path / "cache"))
        evaluate(run, server.url, None, console)
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
        external.build(run, server.url, tmp_path / "bank", console)
        assert [server.requests[f"/train-00000{n}.tar"] for n in (0, 1)] == [1, 1]


def test_a_split_without_a_clip_that_can_be_used_is_one_line(corpus, run, console):
    for shard in corpus.glob("*.tar"):
        shard.write_bytes(b"garbage" * 1000)
    with pytest.raises(InputError, match=r"no clip can be used, the first: .*train-000000\.tar.*; pack them again"):
        evaluate(run, corpus, None, console)


def test_the_sounds_found_are_saved_in_their_order(corpus, run, tmp_path, console):
    config, model = load_model(run)
    encoded = encode(model, ShardList.load(corpus), config, rank=0, world_size=1)
    search_index(encoded, "train").write(run / "index")
    search(run, "noise number 4", None, 3, tmp_path / "hits", console)
    saved = sorted(path.name for path in (tmp_path / "hits").iterdir())
    assert [name[:8] for name in saved] == ["01-clip-", "02-clip-", "03-clip-"]
    assert {name.rpartition(".")[2] for name in saved} == {"flac"}


@torch.no_grad()
def test_a_clip_of_its_own_length_is_encoded_as_if_it_were_alone(run, tmp_path):
    """In evaluation beside longer ones, as a query from a file, and by the model itself."""
    rng, clips = np.random.default_rng(1), []
    for number in range(12):
        audio = rng.normal(scale=0.1, size=1600 * (1 + number % 6)).astype(np.float32)  # 0.1 to 0.6 s
        clips.append(Clip(f"clip-{number:02d}", audio, RATE, (f"noise number {number}",)))
    write_shards(clips, tmp_path / "short", "train")
    configure(run, length_step=0.2)
    config, model = load_model(run)
    encoded = encode(model, ShardList.load(tmp_path / "short"), config, rank=0, world_size=1)
    for row, clip in zip(encoded.audio_features, clips, strict=True):
        length = min(8000, -(-len(clip.audio) // 3200) * 3200)  # of clip_seconds 0.5
        alone = model.encode_audio(torch.from_numpy(fit_length(clip.audio, length, None))[None])[0]
        torch.testing.assert_close(row, alone, atol=1e-3, rtol=0)  # FLAC rounds to 16 bits
        soundfile.write(tmp_path / "query.wav", clip.audio, RATE, subtype="FLOAT")
        query = embed_query(model, config, None, tmp_path / "query.wav")
        torch.testing.assert_close(torch.from_numpy(query), alone, atol=1e-5, rtol=0)
    padded = model.encode_audio(torch.from_numpy(fit_length(clips[0].audio, 8000, None))[None])[0]
    assert (padded - encoded.audio_features[0]).abs().max() > 1e-2
