"""Recipes that build corpora out of sources that package registries carry, and what recipes share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ask_dist.data.shards import ShardList, write_text
from ask_dist.errors import InputError

RECIPE = "recipe.json"


@dataclass(frozen=True)
class BuildSummary:
    """What a recipe built, or found built.

    Attributes:
        scenes: how many in each split.
        classes: how many different classes sound in them.
        source: where the sounds come from.
        licence: of the source.
        seconds: length of all the audio.
    """

    scenes: dict[str, int]
    classes: int
    source: str
    licence: str
    seconds: float


def recipe_matches(folder: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a finished corpus built with exactly these parameters, its splits complete.

    Parameters must be what JSON can hold and should name the recipe and its version.
    """
    path = folder / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        for split in recipe["splits"]:
            ShardList.load(folder / split)
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return False
    return recipe["parameters"] == json.loads(json.dumps(parameters))


def forget_recipe(folder: Path) -> None:
    """Call before building, so that a build that is interrupted doesn't pass for a finished one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).unlink(missing_ok=True)


def write_recipe(folder: Path, parameters: Mapping[str, Any]) -> None:
    """Call when all splits are written: record what they were built with and which splits there are."""
    splits = sorted(path.parent.name for path in folder.glob("*/sizes.json"))
    write_text(folder / RECIPE, json.dumps({"parameters": dict(parameters), "splits": splits}, indent=1) + "\n")


def summarize(folder: Path, source: str, licence: str) -> BuildSummary:
    """The summary of the corpus in `folder`, from the sizes.json of its splits."""
    splits = {path.parent.name: ShardList.load(path.parent) for path in sorted(folder.glob("*/sizes.json"))}
    return BuildSummary(
        scenes={name: shards.clips for name, shards in splits.items()},
        classes=len(set().union(*(shards.classes for shards in splits.values()))),
        source=source,
        licence=licence,
        seconds=sum(shards.seconds for shards in splits.values()),
    )
