"""What README.md and docs/ tell people to type and to look up is there."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
import yaml
from pydantic import BaseModel
from typer.core import TyperGroup

from ask_dist import cli
from ask_dist.config import Config, apply_override, parse
from ask_dist.tune.space import Sweep

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "shards" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = (".csv", ".json", ".jsonl", ".py", ".safetensors", ".yaml")
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TINY = {  # what a corpus of a few tones needs beside the commands of the README
    "pack": ["--clips-per-shard", "12"],
    "check": ["data.clip_seconds=0.5", "optimization.micro_batch_size=8"],
    "train": [
        *("data.clip_seconds=0.5", "optimization.micro_batch_size=8", "optimization.max_steps=12"),
        *("optimization.log_every=1", "optimization.evaluate_every=1", "cluster.dashboard=false"),
        *("model.embedding_dim=32", "model.audio.width=8", "model.text.width=32", "knowledge.neighbours=4"),
        *("knowledge.reliability.rank=4", "bank.prototypes=[4]", "refine.minimum_fresh=8", "refine.interval=0.1"),
        "optimization.deterministic=true",
    ],
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a shell block, as words; without comments."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def typed(page: Path) -> list[list[str]]:
    return [words for block in blocks(page, "shell") for words in commands(block)]


def as_ask_dist(words: list[str]) -> list[str] | None:
    """The arguments of `ask-dist` in a command line, also where a job of jobs/ stands for it."""
    if words[0] == "ask-dist":
        return words[1:]
    job = next((place for place, word in enumerate(words) if re.fullmatch(r"jobs/[a-z]+\.py", word)), None)
    return None if job is None else [Path(words[job]).stem, *words[job + 1 :]]


LINES = [(page.name, arguments) for page in PAGES for words in typed(page) if (arguments := as_ask_dist(words))]


def each_line(lines: list[tuple[str, list[str]]]) -> pytest.MarkDecorator:
    names = [f"{page}: {' '.join(arguments)[:60]}" for page, arguments in lines]
    return pytest.mark.parametrize(("page", "arguments"), lines, ids=names)


@cache
def application() -> TyperGroup:
    return typer.main.get_group(cli.app)


def test_the_pages_show_every_command():
    assert {arguments[0] for _, arguments in LINES} == set(application().commands)


@each_line(LINES)
def test_a_command_line_parses(page, arguments):
    group = application()
    while isinstance(group, TyperGroup):
        group, arguments = group.commands[arguments[0]], arguments[1:]
    group.make_context("ask-dist", list(arguments), resilient_parsing=False)  # raises UsageError for what it lacks


@each_line([line for line in LINES if line[1][0] in ("train", "check", "tune")])
def test_configurations_and_overrides_exist(page, arguments):
    file = arguments[1]
    if file.startswith("configs/"):
        tree = yaml.safe_load((ROOT / file).read_text())
    else:  # written by the reader: the README's own example, or a sweep's best.yaml
        tree = yaml.safe_load(blocks(README, "yaml")[0])
    for override in (word for word in arguments[2:] if not word.startswith("-")):
        apply_override(tree, override)
    if arguments[0] == "tune":
        Sweep.model_validate(tree)
    else:
        parse(tree)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page):
    inline = re.findall(r"`make ([a-z-]+)`", page.read_text())
    assert set(inline) | {words[1] for words in typed(page) if words[0] == "make"} <= MAKE_TARGETS


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page):
    targets = re.findall(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", page.read_text())
    local = [(target, anchor) for target, anchor in targets if "://" not in target]
    missing = [target for target, _ in local if not (page.parent / target).exists()]
    assert not missing
    for target, anchor in local:
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), re.MULTILINE)
            assert anchor[1:] in [heading.lower().replace(" ", "-") for heading in headings]


def default_of(key: str) -> object:
    """The default of `section.key`; AttributeError where the schema has none of that name."""
    model: type[BaseModel] = Config
    *sections, leaf = key.split(".")
    for section in sections:
        if section not in model.model_fields:
            raise AttributeError(key)
        model = model.model_fields[section].annotation  # type: ignore[assignment]
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if leaf not in fields:
        raise AttributeError(key)
    return fields[leaf].default


def names_something(name: str) -> bool:
    """Whether a dotted name is a setting, or a module, class or function below ask_dist."""
    try:
        default_of(name)
    except AttributeError:
        try:
            pkgutil.resolve_name(f"ask_dist.{name}")
        except (ImportError, AttributeError):
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_dotted_names_exist(page):
    tops = "|".join([*Config.model_fields, "losses", "evaluate", "train", "tune"])
    named = re.findall(rf"`((?:{tops})(?:\.[A-Za-z_]+)+)(?:=[^`]*)?`", page.read_text())
    unknown = {name for name in named if not name.endswith(FILES) and not names_something(name)}
    assert not unknown


def test_the_defaults_in_the_table_of_knobs_are_those_of_the_schema():
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \|", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)
    knobs = {key: value.strip() for key, value in rows if "." in key}
    assert len(knobs) > 15
    for key, value in knobs.items():
        default = default_of(key)
        shown = yaml.safe_load(f"[{value}]" if isinstance(default, tuple) else value)
        assert (tuple(shown) if isinstance(default, tuple) else shown) == default, key


def documented_metrics() -> re.Pattern[str]:
    """A pattern for the names in the table of metrics in docs/operations.md; `*` stands for the rest of a name."""
    table = (ROOT / "docs" / "operations.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    names = [
        name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    ]
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names))


def recordings(folder: Path) -> None:
    """Tones in `recordings/` and a table a split, as the README describes them."""
    rng = np.random.default_rng(0)
    (folder / "recordings" / "tones").mkdir(parents=True)
    time = np.arange(8000) / 16000
    for split, count in (("train", 48), ("validation", 12), ("test", 12)):
        lines = ["audio,caption,classes"]
        for number in range(count):
            word, pitch = [("low", 220.0), ("middle", 660.0), ("high", 1980.0)][number % 3]
            name = f"tones/{split}_{number:02d}.wav"
            wave = 0.4 * np.sin(2 * np.pi * pitch * rng.uniform(0.95, 1.05) * time) + 0.01 * rng.standard_normal(8000)
            soundfile.write(folder / "recordings" / name, wave, 16000)
            lines.append(f"{name},a {word} tone number {number},{word}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.ray
def test_bringing_your_own_data_works_as_the_readme_says(tmp_path):
    section = README.read_text().split("## Your own data")[1].split("Two corpora can be built")[0]
    recordings(tmp_path)
    (tmp_path / "mine.yaml").write_text(blocks(README, "yaml")[0])
    shell = "\n".join(re.findall(r"^```shell\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    done = []
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"COLUMNS": "200"}
    for words in commands(shell):
        assert words[0] == "ask-dist"
        program = str(Path(sys.executable).with_name("ask-dist"))
        command = [program, *words[1:], *TINY.get(words[1], [])]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{shlex.join(words)}: {result.stdout[-2000:]} {result.stderr[-2000:]}"
        done.append(words[1])
    assert done == ["pack", "pack", "pack", "check", "train", "search", "evaluate"]
    run = tmp_path / "runs" / "mine"
    assert len(list((tmp_path / "hits").glob("*.flac"))) == 5
    assert {"text_to_audio", "audio_to_text"} <= set(json.loads((tmp_path / "scores.json").read_text()))
    logged = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert "train/knowledge_used" in logged
    assert "eval/validation/text_to_audio_R@1" in logged
    assert not {name for name in logged if not documented_metrics().fullmatch(name)}
