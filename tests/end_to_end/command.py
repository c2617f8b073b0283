"""The installed command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def ask_dist(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ask-dist")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())


def environment() -> dict[str, str]:
    """Without the address of a cluster that another test may have started, and wide enough for whole lines."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"COLUMNS": "200"}
