"""What tests of recipes share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

MakeDeb = Callable[[Path, str, str, Mapping[str, bytes]], Path]


@pytest.fixture
def make_deb() -> MakeDeb:
    """A function (folder, name, version, files) that builds NAME_VERSION_all.deb in the folder with dpkg-deb."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here: they are Debian's")

    def make(folder: Path, name: str, version: str, files: Mapping[str, bytes]) -> Path:
        tree = folder.parent / f"{name}-tree"
        control = tree / "DEBIAN" / "control"
        control.parent.mkdir(parents=True)
        control.write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
        )
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        folder.mkdir(parents=True, exist_ok=True)
        deb = folder / f"{name}_{version}_all.deb"
        command = ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(deb)]
        subprocess.run(command, check=True, capture_output=True)
        return deb

    return make
