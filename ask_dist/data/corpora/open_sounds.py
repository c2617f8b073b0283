"""The corpus "open sounds": scenes composed of real recordings out of Debian packages, with template captions."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from ask_dist.data import audio
from ask_dist.data.captions import swap_captions
from ask_dist.data.corpora import (
    BuildSummary,
    debian,
    forget_recipe,
    near_duplicates,
    recipe_matches,
    scenes,
    summarize,
    write_recipe,
)
from ask_dist.data.corpora.debian import Package
from ask_dist.data.corpora.scenes import RATE, SceneMaker, Sound
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip, write_text
from ask_dist.errors import InputError

CATALOGUE = "open_sounds.csv"
SOURCES = "sources.json"
# Raise it when the same parameters come to give other scenes.
VERSION = 1
COLUMNS = ["package", "path", "class", "phrase", "licence"]
# They seed the draws, so they must not change with the order in which splits are written.
SPLITS = {"train": 0, "validation": 1, "test": 2}
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
SMALLEST_SPLIT_CLASS = 3
LONGEST_SECONDS = 60

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recording:
    """One row of the catalogue.

    Attributes:
        package: Debian's name of the package.
        path: the file in it, or `archive!member`.
        kind: its class.
        phrase: what is heard, in lower-case English, ready to stand in a sentence.
        licence: of this file, as the package's copyright file states it.
    """

    package: str
    path: str
    kind: str
    phrase: str
    licence: str

    @property
    def id(self) -> str:
        """Names the recording in a scene's JSON."""
        return f"{self.package}/{self.path}"


@dataclass(frozen=True)
class Source:
    """A package that the corpus was made of: its version and size, and the licences of the recordings read from it."""

    package: str
    version: str
    megabytes: float
    licences: dict[str, int]

    def __str__(self) -> str:
        licences = ", ".join(f"{licence} ({count})" for licence, count in self.licences.items())
        return f"{self.package} {self.version}: {licences}"


@dataclass(frozen=True)
class OpenSoundsSummary(BuildSummary):
    """What was built, and of what.

    Attributes:
        catalogued: recordings read.
        merged: those left out as near-duplicates of another.
        recordings: those that remained, by split; none is in two.
        swapped: training scenes that carry another scene's caption.
        sources: the packages.
    """

    catalogued: int
    merged: int
    recordings: dict[str, int]
    swapped: int
    sources: tuple[Source, ...]

    def __str__(self) -> str:
        counts = ", ".join(f"{split} {count}" for split, count in self.scenes.items())
        return "\n".join(
            [
                f"{self.catalogued} recordings, {self.merged} of them near-duplicates; {self.classes} classes; "
                f"scenes: {counts}; the captions are templates; made of",
                *map(str, self.sources),
            ]
        )


def catalogue(packages: Sequence[str] | None = None) -> list[Recording]:
    """The catalogue, or the part of it that comes from the given packages.

    Raises:
        InputError: a package that is not in the catalogue.
    """
    text = resources.files("ask_dist.data.corpora").joinpath(CATALOGUE).read_text(encoding="ascii")
    rows = [Recording(*(row[column] for column in COLUMNS)) for row in csv.DictReader(text.splitlines())]
    if packages is None:
        return rows
    known = sorted({row.package for row in rows})
    unknown = sorted(set(packages) - set(known))
    if unknown:
        raise InputError(f"not in the catalogue: {', '.join(unknown)}; choose from {', '.join(known)}")
    return [row for row in rows if row.package in packages]


def build(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 2400,
    validation: int = 300,
    test: int = 600,
    swap_captions: float = 0.0,
    seconds: float = 5.0,
    packages: Sequence[str] | None = None,
    cache: Path = Path(".cache/open_sounds"),
    progress: Progress | None = None,
) -> OpenSoundsSummary:
    """Build the corpus in `folder`, unless it is there already with the same parameters.

    The same parameters and the same versions of the packages give the same waveforms and captions.

    Args:
        folder: gets train/, validation/ and test/ with their shards, SOURCES.md, sources.json and recipe.json.
        seed: of the split and of every draw.
        train: scenes of the training split; likewise validation and test.
        swap_captions: share of the training scenes whose captions are exchanged among themselves.
        seconds: length of a scene.
        packages: use these alone, by default all of the catalogue.
        cache: keeps downloads and unpacked packages.
        progress: called with a stage's name, how much of it is done, and how much there is.

    Raises:
        InputError: a parameter is out of range, there is no apt-get, or a package can't be fetched or read.
    """
    folder, counts = Path(folder), {"train": train, "validation": validation, "test": test}
    _check_parameters(seed, counts, swap_captions, seconds)
    rows = catalogue(packages)
    parameters = {
        "recipe": "open_sounds",
        "version": VERSION,
        "seed": seed,
        **counts,
        "swap_captions": swap_captions,
        "seconds": seconds,
        "recordings": hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest(),
    }
    if not recipe_matches(folder, parameters):
        report = progress or (lambda stage, done, total: None)
        fetched = _fetch_all(rows, cache, report)
        sounds = _distinct_sounds(rows, fetched, report)
        parts = split_by_recording([sound.kind for sound in sounds], seed)
        empty = [split for split, part in parts.items() if not part]
        if empty:
            raise InputError(f"{len(sounds)} recordings leave none for {' and '.join(empty)}: take more packages")
        forget_recipe(folder)
        for split, count in counts.items():
            clips = compose(split, [sounds[i] for i in parts[split]], count, seed, seconds)
            clips = swap(clips, swap_captions if split == "train" else 0.0, seed)
            write_shards(_counted(clips, f"writing {split}", report), folder / split, split)
        sources = [_source(package, rows) for package in fetched.values()]
        _write_sources(folder, rows, {split: len(part) for split, part in parts.items()}, sources)
        write_recipe(folder, parameters)
    return _summarize(folder, round(swap_captions * train))


def _check_parameters(seed: int, counts: Mapping[str, int], swap_captions: float, seconds: float) -> None:
    if seed < 0:
        raise InputError(f"seed is {seed}: give 0 or more")
    if min(counts.values()) < 1:
        raise InputError(f"scenes per split are {dict(counts)}: give at least 1 for each")
    if not 0 <= swap_captions <= 1:
        raise InputError(f"swap_captions is {swap_captions}: give a share from 0 to 1")
    if not 1 <= seconds <= LONGEST_SECONDS:
        raise InputError(f"seconds is {seconds}: give 1 to {LONGEST_SECONDS}")


def _fetch_all(rows: Sequence[Recording], cache: Path, report: Progress) -> dict[str, Package]:
    names = sorted({row.package for row in rows})
    fetched = {}
    for done, name in enumerate(names):
        report(f"fetching {name}", done, len(names))
        fetched[name] = debian.fetch(name, cache)
    report("fetching", len(names), len(names))
    return fetched


def _distinct_sounds(rows: Sequence[Recording], fetched: Mapping[str, Package], report: Progress) -> list[Sound]:
    """The recordings of the catalogue, trimmed and of one loudness, without near-duplicates of an earlier one."""
    sounds = []
    for done, row in enumerate(rows, 1):
        root = fetched[row.package].root
        try:
            waveform, rate = audio.decode(debian.read_member(root, row.path))
        except audio.BadSample as error:
            raise InputError(f"{row.id}: {error}; delete {root} and build again") from None
        waveform = scenes.prepare(audio.resample(waveform[: LONGEST_SECONDS * rate], rate, RATE))
        sounds.append(Sound(row.id, waveform, row.phrase, row.kind, row.licence))
        report("reading recordings", done, len(rows))
    small = [audio.resample(sound.audio, RATE, near_duplicates.RATE) for sound in sounds]
    return [sounds[group[0]] for group in near_duplicates.merge_near_duplicates(small)]


def split_by_recording(kinds: Sequence[str], seed: int) -> dict[str, list[int]]:
    """Deal the recordings of each class out to the splits, at random by the seed.

    Of a class with three or more a fifth is for testing and a tenth for validation, rounded (but one for testing); the
    rest, and all of a smaller class, is for training.

    Args:
        kinds: the class of each recording.

    Returns:
        Ascending indices for train, validation and test, which share none.
    """
    by_kind = defaultdict(list)
    for index, kind in enumerate(kinds):
        by_kind[kind].append(index)
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    rng = np.random.default_rng([seed, len(SPLITS)])
    for _, members in sorted(by_kind.items()):
        order = [members[i] for i in rng.permutation(len(members))]
        is_split = len(order) >= SMALLEST_SPLIT_CLASS
        tested = max(1, int(len(order) * TEST_SHARE + 0.5)) if is_split else 0
        validated = tested + (int(len(order) * VALIDATION_SHARE + 0.5) if is_split else 0)
        parts["test"] += order[:tested]
        parts["validation"] += order[tested:validated]
        parts["train"] += order[validated:]
    return {split: sorted(part) for split, part in parts.items()}


def compose(split: str, sounds: Sequence[Sound], count: int, seed: int, seconds: float) -> list[Clip]:
    """The scenes of a split: for training by a Zipf law over classes, else all classes and no two stories alike."""
    training = split == "train"
    maker = SceneMaker(sounds, [seed, SPLITS[split]], seconds=seconds, zipf=training, distinct=not training)
    return [maker.make(f"open-sounds-{split}-{index:06d}", index) for index in range(count)]


def swap(clips: Sequence[Clip], share: float, seed: int) -> list[Clip]:
    """Exchange the captions of a share of the clips among themselves; extra["swapped"] tells whose changed."""
    captions, swapped = swap_captions([clip.captions for clip in clips], share, seed)
    return [
        replace(clip, captions=words, extra={**clip.extra, "swapped": bool(changed)})
        for clip, words, changed in zip(clips, captions, swapped, strict=True)
    ]


def _counted(clips: Sequence[Clip], stage: str, report: Progress) -> Iterator[Clip]:
    for done, clip in enumerate(clips, 1):
        yield clip
        report(stage, done, len(clips))


def _source(package: Package, rows: Sequence[Recording]) -> Source:
    licences = Counter(row.licence for row in rows if row.package == package.name)
    return Source(package.name, package.version, round(package.size / 1e6, 1), dict(sorted(licences.items())))


def _write_sources(
    folder: Path, rows: Sequence[Recording], recordings: Mapping[str, int], sources: Sequence[Source]
) -> None:
    """Write sources.json, and SOURCES.md for people: where the recordings are from and under which licences."""
    facts = {
        "catalogued": len(rows),
        "merged": len(rows) - sum(recordings.values()),
        "recordings": recordings,
        "sources": [asdict(source) for source in sources],
    }
    write_text(folder / SOURCES, json.dumps(facts, indent=1) + "\n")
    lines = [
        "# Sources",
        "",
        "Scenes composed of recordings out of Debian packages. The captions are templates; nobody listened.",
        "The file `copyright` of a package names the authors. In brackets: recordings read from it.",
        "",
        *(f"- {source}" for source in sources),
    ]
    write_text(folder / "SOURCES.md", "\n".join(lines) + "\n")


def _summarize(folder: Path, swapped: int) -> OpenSoundsSummary:
    facts = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
    sources = tuple(Source(**source) for source in facts.pop("sources"))
    licences = sorted(set().union(*(source.licences for source in sources)))
    plain = summarize(folder, "Debian packages", ", ".join(licences))
    return OpenSoundsSummary(**asdict(plain), **facts, swapped=swapped, sources=sources)
