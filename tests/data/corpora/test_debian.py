"""Fetching, unpacking and reading Debian packages; packages are made here with dpkg-deb, or really downloaded."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ask_dist.data.corpora.debian import fetch, read_member
from ask_dist.errors import InputError

MakeDeb = Callable[..., Path]


def test_a_package_in_the_cache_is_unpacked_once_and_used_again(tmp_path: Path, make_deb: MakeDeb) -> None:
    deb = make_deb(tmp_path / "debs", "hoots", "1.2-3", {"usr/share/owl.wav": b"hoo"})
    package = fetch("hoots", tmp_path)
    assert (package.name, package.version, package.size) == ("hoots", "1.2-3", deb.stat().st_size)
    assert read_member(package.root, "usr/share/owl.wav") == b"hoo"
    (package.root / "mark").touch()
    assert fetch("hoots", tmp_path) == package
    assert (package.root / "mark").exists()
    assert [path.name for path in (tmp_path / "unpacked").iterdir()] == ["hoots_1.2-3_all"]


def test_a_package_whose_name_begins_alike_is_not_taken(tmp_path: Path, make_deb: MakeDeb) -> None:
    make_deb(tmp_path / "debs", "owl-extra", "1", {"a": b"extra"})
    make_deb(tmp_path / "debs", "owl", "2", {"a": b"plain"})
    assert read_member(fetch("owl", tmp_path).root, "a") == b"plain"


def test_a_damaged_package_is_an_input_error_and_leaves_nothing_unpacked(tmp_path: Path, make_deb: MakeDeb) -> None:
    deb = make_deb(tmp_path / "debs", "hoots", "1", {"usr/share/owl.wav": bytes(range(256)) * 64})
    content = deb.read_bytes()
    deb.write_bytes(content[: len(content) - 200])
    with pytest.raises(InputError, match=r"hoots_1_all\.deb is damaged: delete it") as caught:
        fetch("hoots", tmp_path)
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "unpacked").glob("*"))


def test_no_apt_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no apt-get and no dpkg-deb here"):
        fetch("hoots", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is Debian's")
def test_an_unknown_package_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no-such-package-of-owls|apt-get update") as caught:
        fetch("no-such-package-of-owls", tmp_path)
    assert "\n" not in str(caught.value)


def test_members_of_archives_are_read_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sounds.pk3", "w") as archive:
        archive.writestr("sound/owl.ogg", b"hoo")
        archive.writestr("../escaped.ogg", b"out")
    assert read_member(tmp_path, "sounds.pk3!sound/owl.ogg") == b"hoo"
    assert read_member(tmp_path, "sounds.pk3!../escaped.ogg") == b"out"
    assert [path.name for path in tmp_path.iterdir()] == ["sounds.pk3"]


@pytest.mark.parametrize(
    "path", ["gone.wav", "folder", "../outside.wav", "link.wav", "sounds.pk3!gone.ogg", "no.pk3!a"]
)
def test_what_is_not_a_file_of_the_package_is_an_input_error(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "outside.wav").write_bytes(b"secret")
    (root / "link.wav").symlink_to(tmp_path / "outside.wav")
    (root / "no.pk3").write_bytes(b"not a zip")
    with zipfile.ZipFile(root / "sounds.pk3", "w") as archive:
        archive.writestr("owl.ogg", b"hoo")
    with pytest.raises(InputError, match=r"build it there|build again"):
        read_member(root, path)


def test_a_member_that_unpacks_to_far_too_much_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pk3", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(65 * 2**20))
    with pytest.raises(InputError, match="not a recording"):
        read_member(tmp_path, "bomb.pk3!a.wav")
