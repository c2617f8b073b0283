from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ask_dist.data.shards import ShardList, stable_id
from ask_dist.errors import InputError


def test_stable_id_is_the_head_of_blake2b() -> None:
    head = hashlib.blake2b(b"clip-001").digest()[:8]
    assert stable_id("clip-001") == int.from_bytes(head, "little", signed=True) == 4149812108379707783
    assert len({stable_id(f"clip-{n}") for n in range(10000)}) == 10000


def test_a_list_holds_what_sizes_says(corpus: Path) -> None:
    shards = ShardList.load(corpus)
    assert shards.names == tuple(f"train-{n:06d}.tar" for n in range(11))
    assert shards.counts == (10,) * 10 + (3,)
    assert shards.clips == 103
    assert shards.seconds == pytest.approx(103 * 400 / 8000)
    assert shards.classes == {"class 0": 26, "class 1": 26, "class 2": 26, "class 3": 25}


def test_several_folders_add_up_in_the_order_given(corpus: Path, tmp_path: Path) -> None:
    other = shutil.copytree(corpus, tmp_path / "other")
    both = ShardList.load([other, corpus])
    assert both.clips == 206
    assert both.classes["class 3"] == 50
    assert [path.parent for path in both.paths] == [other] * 11 + [corpus] * 11


def test_a_shard_that_is_named_twice_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(corpus)
    tar = f"{corpus}/train-000003.tar"
    for places in ([corpus, corpus], [corpus, f"{corpus}/"], [tar, f"{tmp_path}/l*"], [tar, tar]):
        with pytest.raises(InputError, match=r"train-00000[03]\.tar is named twice, by .* and by .*: name it once"):
            ShardList.load(places, weights=[1.0, 2.0])
    assert ShardList.load([tar, f"{corpus}/train-000004.tar"]).counts == (10, 10)


@pytest.mark.parametrize(
    ("place", "numbers"),
    [
        ("train-{000002..000004}.tar", [2, 3, 4]),
        ("train-00000[12].tar", [1, 2]),
        ("train-{000007,00000[89],0000?0}.tar", [0, 7, 8, 9, 10]),
    ],
)
def test_written_out_names_and_patterns_choose_shards(corpus: Path, place: str, numbers: list[int]) -> None:
    assert ShardList.load(f"{corpus}/{place}").names == tuple(f"train-{number:06d}.tar" for number in numbers)


def test_the_fingerprint_changes_with_the_content(corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    assert ShardList.load(copy).fingerprint == ShardList.load(corpus).fingerprint
    change(copy, lambda sizes: sizes["shards"]["train-000000.tar"].update(sha256="other"))
    assert ShardList.load(copy).fingerprint != ShardList.load(corpus).fingerprint


def change(folder: Path, how: Any) -> None:
    sizes = json.loads((folder / "sizes.json").read_text())
    how(sizes)
    (folder / "sizes.json").write_text(json.dumps(sizes))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda sizes: sizes.update(format=2), "format is 2, this version reads 1"),
        (lambda sizes: sizes.update(shards={}), "no shards are listed"),
        (lambda sizes: sizes.update(shards=["a.tar"]), "no shards are listed"),
        (lambda sizes: sizes.update(sample_rate="16k"), "sample_rate is '16k'"),
        (lambda sizes: sizes.update(classes=None), "classes is not"),
        (lambda sizes: sizes["shards"].update({"../train-000000.tar": {}}), "not the name of a tar file"),
        (lambda sizes: sizes["shards"]["train-000000.tar"].update(clips=True), "no whole number of clips"),
        (lambda sizes: sizes["shards"]["train-000000.tar"].pop("sha256"), "lacks seconds or sha256"),
        (lambda sizes: sizes["shards"].update({"gone.tar": sizes["shards"]["train-000000.tar"]}), "gone.tar.*missing"),
    ],
)
def test_a_wrong_sizes_json_is_named(corpus: Path, tmp_path: Path, how: Any, message: str) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    change(copy, how)
    with pytest.raises(InputError, match=message):
        ShardList.load(copy)


def test_missing_folder_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        ShardList.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no sizes\.json"):
        ShardList.load(tmp_path)
    (tmp_path / "sizes.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        ShardList.load(tmp_path)
    (tmp_path / "sizes.json").write_text("[]")
    with pytest.raises(InputError, match="format is 'list'"):
        ShardList.load(tmp_path)
