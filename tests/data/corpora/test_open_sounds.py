"""The open sounds: the catalogue, the split by recording, swapped captions, and whole builds."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ask_dist.data.corpora.open_sounds import build, catalogue, split_by_recording, swap
from ask_dist.data.shards import Clip
from ask_dist.errors import InputError

MakeDeb = Callable[..., Path]

SMALL = "sound-icons"
COUNTS: dict[str, Any] = {"train": 12, "validation": 3, "test": 6}


def test_the_catalogue_is_large_and_has_many_classes() -> None:
    rows = catalogue()
    assert len(rows) >= 900
    kinds = Counter(row.kind for row in rows)
    assert len(kinds) >= 80
    assert sum(count >= 4 for count in kinds.values()) >= 80


def test_every_entry_is_complete_and_no_recording_is_listed_twice() -> None:
    rows = catalogue()
    assert len({row.id for row in rows}) == len(rows)
    assert rows == sorted(rows, key=lambda row: (row.package, row.path))
    for row in rows:
        assert re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", row.package), row
        assert re.search(r"\.(wav|ogg|oga|flac|mp3)$", row.path), row
        assert not row.path.startswith("/"), row
        assert ".." not in row.path.split("/"), row
        assert row.licence.strip(), row


def test_phrases_stand_in_a_sentence_and_belong_to_one_class() -> None:
    kinds: dict[str, str] = {}
    for row in catalogue():
        assert re.fullmatch(r"[a-z][a-z -]*[a-z]", row.phrase), row
        assert re.fullmatch(r"[a-z][a-z -]*[a-z]", row.kind), row
        assert len(row.phrase.split()) <= 12, row
        assert kinds.setdefault(row.phrase, row.kind) == row.kind, row


def test_a_part_of_the_catalogue_is_chosen_by_package() -> None:
    assert {row.package for row in catalogue([SMALL])} == {SMALL}
    with pytest.raises(InputError, match=r"not in the catalogue: owl-sounds; choose from crossfire-client"):
        catalogue([SMALL, "owl-sounds"])


def test_no_recording_is_in_two_splits_and_shares_are_kept_per_class() -> None:
    kinds = ["ten"] * 10 + ["three"] * 3 + ["five"] * 5 + ["two"] * 2 + ["one"]
    parts = split_by_recording(kinds, seed=5)
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == list(range(len(kinds)))
    counted = {split: Counter(kinds[index] for index in part) for split, part in parts.items()}
    assert counted == {
        "train": {"ten": 7, "five": 3, "three": 2, "two": 2, "one": 1},
        "validation": {"ten": 1, "five": 1},
        "test": {"ten": 2, "five": 1, "three": 1},
    }
    assert parts == split_by_recording(kinds, seed=5)
    assert parts != split_by_recording(kinds, seed=6)


def clips(captions: list[str]) -> list[Clip]:
    audio = np.zeros(4, np.float32)
    return [Clip(str(index), audio, 16000, (caption,), extra={"n": index}) for index, caption in enumerate(captions)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_swapped_captions_are_others_words_and_none_is_lost(share: float) -> None:
    before = clips([f"caption {index // 2}" for index in range(40)])
    after = swap(before, share, seed=0)
    changed = [new for old, new in zip(before, after, strict=True) if old.captions != new.captions]
    assert len(changed) == share * 40
    assert [clip.extra["swapped"] for clip in after] == [clip in changed for clip in after]
    assert Counter(clip.captions for clip in after) == Counter(clip.captions for clip in before)
    assert [clip.extra["n"] for clip in after] == list(range(40))


def test_too_many_equal_captions_can_not_be_swapped() -> None:
    with pytest.raises(InputError, match="too few differ"):
        swap(clips(["same", "same", "same", "other"]), 1.0, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 0}, "give at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"swap_captions": 1.5}, "swap_captions is 1.5"),
        ({"seconds": 0.5}, "seconds is 0.5"),
    ],
)
def test_parameters_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path / "corpus", cache=tmp_path / "cache", **changes)
    assert not (tmp_path / "corpus").exists()


def lay_package(make_deb: MakeDeb, cache: Path, but: str = "") -> None:
    """A sound-icons whose files hold a tone or a noise each, the first two alike; so a build needs no network."""
    rng = np.random.default_rng(0)
    files = {}
    for number, row in enumerate(catalogue([SMALL])):
        time = np.arange(4000 + 300 * number) / 16000
        sound = np.sin(2 * np.pi * 300 * time) if number < 2 else rng.normal(size=len(time))
        file = io.BytesIO()
        soundfile.write(file, 0.2 * np.exp(-3 * time) * sound, 16000, format="WAV")
        files[row.path] = b"no audio" if row.path == but else file.getvalue()
    make_deb(cache / "debs", SMALL, "9-1", files)


def read_split(folder: Path) -> list[tuple[dict[str, Any], np.ndarray, int]]:
    """JSON, samples and sample rate of every clip of a split, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {name: file.read() for name in tar.getnames() if (file := tar.extractfile(name))}
        for name in sorted(members):
            if name.endswith(".json"):
                samples, rate = soundfile.read(io.BytesIO(members[name.replace(".json", ".flac")]), dtype="float32")
                found.append((json.loads(members[name]), samples, rate))
    return found


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.tar"))}


def test_a_build_keeps_recordings_apart_and_says_where_they_are_from(tmp_path: Path, make_deb: MakeDeb) -> None:
    lay_package(make_deb, tmp_path / "cache")
    stages = []
    summary = build(
        tmp_path / "corpus",
        **COUNTS,
        swap_captions=0.5,
        packages=[SMALL],
        cache=tmp_path / "cache",
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    rows = {row.id: row for row in catalogue([SMALL])}
    assert summary.scenes == COUNTS
    assert (summary.catalogued, summary.merged, summary.swapped) == (len(rows), 1, 6)
    assert sum(summary.recordings.values()) == len(rows) - 1
    assert [(source.package, source.version, source.licences) for source in summary.sources] == [
        (SMALL, "9-1", {"GPL-2+": len(rows)})
    ]
    assert f"{SMALL} 9-1: GPL-2+ ({len(rows)})" in str(summary)
    assert f"{SMALL} 9-1: GPL-2+ ({len(rows)})" in (tmp_path / "corpus" / "SOURCES.md").read_text()
    assert ("writing test", 6, 6) in stages
    heard = {}
    for split, count in COUNTS.items():
        scenes = read_split(tmp_path / "corpus" / split)
        assert len(scenes) == count
        heard[split] = {recording for facts, _, _ in scenes for recording in facts["recordings"]}
        assert heard[split] <= set(rows)
        for facts, samples, rate in scenes:
            assert (rate, len(samples)) == (16000, 80000)
            assert 0.01 < np.abs(samples).max() < 1
            told = all(rows[recording].phrase in facts["captions"][0] for recording in facts["recordings"])
            assert told or facts["swapped"]
            assert facts["licences"] == ["GPL-2+"]
        assert sum(facts["swapped"] for facts, _, _ in scenes) == (6 if split == "train" else 0)
    assert not heard["train"] & heard["test"]
    assert not heard["train"] & heard["validation"]
    assert not heard["test"] & heard["validation"]


def test_a_build_is_reproducible_and_not_repeated_in_vain(tmp_path: Path, make_deb: MakeDeb) -> None:
    lay_package(make_deb, tmp_path / "cache")
    arguments: dict[str, Any] = {**COUNTS, "packages": [SMALL], "cache": tmp_path / "cache"}
    first = build(tmp_path / "one", **arguments)
    assert build(tmp_path / "two", **arguments) == first
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    shutil.rmtree(tmp_path / "cache")
    assert build(tmp_path / "one", **arguments) == first  # it has nothing left to be built from
    lay_package(make_deb, tmp_path / "again")
    build(tmp_path / "two", **{**arguments, "cache": tmp_path / "again", "seed": 1})
    assert not set(digests(tmp_path / "one").values()) & set(digests(tmp_path / "two").values())


def test_a_recording_that_is_no_audio_is_an_input_error(tmp_path: Path, make_deb: MakeDeb) -> None:
    bad = catalogue([SMALL])[4]
    lay_package(make_deb, tmp_path / "cache", but=bad.path)
    with pytest.raises(InputError, match=re.escape(bad.id)) as caught:
        build(tmp_path / "corpus", **COUNTS, packages=[SMALL], cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_too_few_recordings_for_the_splits_are_an_input_error(tmp_path: Path, make_deb: MakeDeb) -> None:
    package = "minetest-mod-xdecor"
    time = np.arange(8000) / 16000
    files = {}
    for number, row in enumerate(catalogue([package])):
        file = io.BytesIO()
        soundfile.write(file, 0.2 * np.sin(2 * np.pi * 300 * (number + 1) * time), 16000, format="WAV")
        files[row.path] = file.getvalue()
    make_deb(tmp_path / "cache" / "debs", package, "1", files)
    with pytest.raises(InputError, match="3 recordings leave none for validation and test: take more packages"):
        build(tmp_path / "corpus", packages=[package], cache=tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is Debian's")
def test_a_small_corpus_of_a_package_that_is_really_fetched(tmp_path: Path) -> None:
    try:
        summary = build(tmp_path / "corpus", **COUNTS, packages=[SMALL], cache=tmp_path / "cache")
    except InputError as error:
        if "can't download" in str(error) or "apt-get update" in str(error):
            pytest.skip(f"no Debian archive can be reached: {error}")
        raise
    assert summary.scenes == COUNTS
    assert summary.catalogued == len(catalogue([SMALL]))
    for split, count in COUNTS.items():
        assert len(read_split(tmp_path / "corpus" / split)) == count
