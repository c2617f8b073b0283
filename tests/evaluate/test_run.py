"""What is done with a finished run: its shards are read as the run read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rich.console import Console

from ask_dist.data.shards import ShardList
from ask_dist.evaluate import external
from ask_dist.evaluate.encode import encode, search_index
from ask_dist.evaluate.run import evaluate, search
from ask_dist.models.saved import load_model
from tests.data.server import serving
from tests.finished_run import noise_corpus, untrained_run


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


def test_the_sounds_found_are_saved_in_their_order(corpus, run, tmp_path, console):
    config, model = load_model(run)
    encoded = encode(model, ShardList.load(corpus), config, rank=0, world_size=1)
    search_index(encoded, "train").write(run / "index")
    search(run, "noise number 4", None, 3, tmp_path / "hits", console)
    saved = sorted(path.name for path in (tmp_path / "hits").iterdir())
    assert [name[:8] for name in saved] == ["01-clip-", "02-clip-", "03-clip-"]
    assert {name.rpartition(".")[2] for name in saved} == {"flac"}
