"""A run whose shards lie in an object store, against the same run on the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.bucket import serving_bucket
from tests.end_to_end.command import ask_dist

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

REPEATABLE = (
    *("optimization.deterministic=true", "optimization.log_every=1", "optimization.epochs=2"),
    *("cluster.num_workers=2", "data.loader_processes=2"),
)


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_run_on_a_bucket_has_the_losses_of_the_run_on_the_folder(
    scheme: str, config_file: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nobody").mkdir()
    with serving_bucket(scheme, "tones", monkeypatch, tmp_path / "nobody") as bucket:
        places = [f"data.cache_dir={tmp_path / 'cache'}"]
        for split in ("train", "validation", "test"):
            bucket.put(tones / split, split)
            places.append(f"data.{split}={bucket.url}/{split}")
        for name, changes in (("local", []), ("remote", places)):
            done = ask_dist("train", config_file, *REPEATABLE, *changes, f"name={name}")
            assert done.returncode == 0, done.stderr
    local, remote = losses(tmp_path / "runs" / "local"), losses(tmp_path / "runs" / "remote")
    assert len(local) == 10
    assert remote == local
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 6
