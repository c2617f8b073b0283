"""What clips of published corpora were cut from, named alike for all of them: leaks.py compares these names."""

from __future__ import annotations

import re
from typing import Any

# As AudioSet (a Y before it) and AudioSetCaps (the place of the clip in the video behind it) write YouTube's ids.
VIDEO = re.compile(r"(?:Y(?=.{11}$))?([A-Za-z0-9_-]{11})(?:_[0-9]+)?")


def youtube(name: Any) -> dict[str, str]:
    """{"recording": "youtube:ID"} for a clip's JSON; nothing for what names no video."""
    video = VIDEO.fullmatch(str(name).strip())
    return {"recording": f"youtube:{video[1]}"} if video else {}


def freesound(number: Any) -> dict[str, str]:
    """{"recording": "freesound:NUMBER"} for a clip's JSON; nothing for what is no number, such as "Not found"."""
    number = str(number).strip()
    return {"recording": f"freesound:{number}"} if number.isdecimal() else {}
