from __future__ import annotations

from pathlib import Path

import numpy as np

from ask_dist.data.corpora import forget_recipe, recipe_matches, summarize, write_recipe
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip

PARAMETERS = {"recipe": "noise", "version": 1, "sizes": (1, 2)}


def built(folder: Path) -> Path:
    noise = np.random.default_rng(0).uniform(-1, 1, 800).astype(np.float32)
    forget_recipe(folder)
    for split, sounds in (("train", "ab"), ("test", "bc")):
        clips = (Clip(f"{split}-{name}", noise, 8000, ("noise",), (name,)) for name in sounds)
        write_shards(clips, folder / split, split)
    write_recipe(folder, PARAMETERS)
    return folder


def test_a_finished_corpus_matches_its_own_parameters_alone(tmp_path: Path) -> None:
    assert not recipe_matches(tmp_path, PARAMETERS)
    assert recipe_matches(built(tmp_path), PARAMETERS)
    assert not recipe_matches(tmp_path, {**PARAMETERS, "version": 2})
    assert not recipe_matches(tmp_path, {**PARAMETERS, "more": None})


def test_an_unfinished_or_damaged_corpus_does_not_match(tmp_path: Path) -> None:
    folder = built(tmp_path)
    forget_recipe(folder)
    assert not recipe_matches(folder, PARAMETERS)
    (built(folder) / "test" / "test-000000.tar").unlink()
    assert not recipe_matches(folder, PARAMETERS)
    (built(folder) / "train" / "sizes.json").unlink()
    assert not recipe_matches(folder, PARAMETERS)
    for text in ("{", "[]", "{}", '{"parameters": {}, "splits": 3}'):
        (built(folder) / "recipe.json").write_text(text)
        assert not recipe_matches(folder, PARAMETERS)


def test_summarize_counts_over_the_splits(tmp_path: Path) -> None:
    summary = summarize(built(tmp_path), "a generator", "none")
    assert summary.scenes == {"train": 2, "test": 2}
    assert (summary.classes, summary.source, summary.licence) == (3, "a generator", "none")
    assert round(summary.seconds, 6) == 0.4
