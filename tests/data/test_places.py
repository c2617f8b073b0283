from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry

from ask_dist.data.places import expand, filesystem
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from tests.data.server import serving


def folders(place: str | Path) -> list[str]:
    return [folder for folder, _ in expand(place)]


def test_braces_are_written_out_and_stars_looked_up(tmp_path: Path) -> None:
    for name in ("a/train", "b/train", "c/test", "odd{1}/train"):
        (tmp_path / name).mkdir(parents=True)
    assert folders(f"{tmp_path}/{{b,a}}/train") == [f"{tmp_path}/b/train", f"{tmp_path}/a/train"]
    assert folders(f"{tmp_path}/*/train") == sorted(f"{tmp_path}/{name}/train" for name in ("a", "b", "odd{1}"))
    assert folders(f"{tmp_path}/[ab]/train") == [f"{tmp_path}/a/train", f"{tmp_path}/b/train"]
    assert folders(tmp_path / "odd{1}/train") == [f"{tmp_path}/odd{{1}}/train"]
    assert folders("s3://bucket/{0..2}") == [f"s3://bucket/{number}" for number in range(3)]
    assert folders("https://host/a/") == ["https://host/a"]
    with pytest.raises(InputError, match="nothing matches"):
        expand(f"{tmp_path}/x*")
    with pytest.raises(InputError, match="write braces as"):
        expand("shards/{a,b")


def test_tar_files_can_be_named_one_by_one(corpus: Path) -> None:
    assert ShardList.load(f"{corpus}/train-{{000002..000004}}.tar").names == tuple(
        f"train-00000{number}.tar" for number in (2, 3, 4)
    )
    assert len(ShardList.load(f"{corpus}/train-00000*.tar").names) == 10
    for place in (f"{{{corpus},{corpus}/train-000000.tar}}", f"{{{corpus}/train-000000.tar,{corpus}}}"):
        assert ShardList.load(place).clips == 103  # the folder is named, so all of it is
    with pytest.raises(InputError, match=r"no shard of .* matches other-\*\.tar"):
        ShardList.load(f"{corpus}/other-*.tar")


def test_patterns_behind_urls(corpus: Path) -> None:
    with serving(corpus.parent) as server:
        assert folders(f"{server.url}/t*") == [f"{server.url}/train"]
        assert ShardList.load(f"{server.url}/t*/train-00000{{1,2}}.tar").counts == (10, 10)
        with pytest.raises(InputError, match="nothing matches"):
            expand(f"{server.url}/x*")
        with pytest.raises(InputError, match=r"/train/train-000000\.tar is named twice"):
            ShardList.load([f"{server.url}/train", f"{server.url}/t*"])


def test_fsspec_file_systems_serve_as_well(corpus: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(corpus), "/corpus", recursive=True)
    assert ShardList.load("memory://corpus").fingerprint == ShardList.load(corpus).fingerprint


@pytest.mark.parametrize(
    "url", ["pipe://ls", "simplecache::http://x/y", "reference://x", "ssh://host/x", "github://a:b@/x", "exec://x"]
)
def test_other_schemes_and_chains_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="is not among http, https, s3, gs"):
        filesystem(url)


def test_pipes_are_folders_that_do_not_exist() -> None:
    with pytest.raises(InputError, match="no folder pipe:"):
        ShardList.load("pipe:touch /tmp/never")


@pytest.mark.parametrize(("url", "library"), [("s3://bucket/x", "s3fs"), ("gs://bucket/x", "gcsfs")])
def test_an_object_store_without_its_library_says_what_to_install(
    url: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (library, f"{library}.core"):  # as where it is not installed
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(_registry, url.split(":")[0], raising=False)  # nor was before
    with pytest.raises(InputError, match=f"needs {library}: pip install {library}"):
        filesystem(url)
