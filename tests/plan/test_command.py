"""`ask-dist plan` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ask_dist import cli
from ask_dist.errors import InputError
from ask_dist.plan.command import span

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def run(*arguments: str | Path) -> int:
    """The exit code of `ask-dist plan CONFIG arguments`, away from any bench's file."""
    try:
        return cli.main(["plan", str(CONFIG), *(str(argument) for argument in arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")


def test_a_range_is_planned_printed_drawn_and_written(tmp_path, capsys):
    files = [tmp_path / "out" / name for name in ("plan.json", "plan.png", "plan.md")]
    options = zip(("--output", "--plot", "--markdown"), files, strict=True)
    assert run("--workers", "8..32", "--rows", "1e6..1e7", *(word for pair in options for word in pair)) == 0
    printed = capsys.readouterr().out
    plans = json.loads(files[0].read_text())["plans"]
    assert [(plan["load"]["rows"], plan["load"]["workers"]) for plan in plans] == [
        (rows, workers) for rows in (10**6, 10**7) for workers in (8, 16, 32)
    ]
    assert all(plan["most_workers"] >= plan["load"]["workers"] for plan in plans if not plan["outcome"]["problems"])
    assert "where it breaks" in printed
    assert files[1].read_bytes().startswith(b"\x89PNG")
    tables = files[2].read_text().split("\n\n")
    assert [len(table.splitlines()) for table in tables[:2]] == [8, 8]
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    assert "| bytes of a row, flat, float16 |" in tables[2]


def test_one_load_is_planned_for_every_index(tmp_path, capsys):
    assert run("--workers", "512", "--rows", "1e8", "--output", tmp_path / "plan.json") == 0
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert {plan["outcome"]["layout"]["index"] for plan in plans} >= {"flat", "ivf_flat"}
    assert "512 workers and 1e+08 rows" in capsys.readouterr().out


def test_what_nothing_holds_says_why(tmp_path, capsys):
    assert run("--workers", "1024", "--rows", "1e9", "--memory", "0.5", "--output", tmp_path / "plan.json") == 0
    assert "nothing within reach holds 1024 workers" in capsys.readouterr().out
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert all(plan["outcome"]["problems"] for plan in plans)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "many"], "--workers many is no number"),
        (["--rows", "1e9..1e6"], "must rise"),
        (["--gpu"], "no search was measured with a GPU"),
        (["--constants", "none.json"], "no file none.json"),
        (["bank.treads=2"], "unknown key bank.treads"),
    ],
)
def test_input_errors_are_one_line_and_exit_2(arguments, said, capsys):
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_passes_of_reencode_lengthen_a_step_by_the_clips_of_an_epoch(tmp_path, capsys):
    steps = {}
    for clips in ("1e8", "1e6"):
        settings = ("--workers", "512", "--rows", "1e8", "--step-seconds", "1", "--clips", clips)
        assert run(*settings, "refine.strategy=reencode", "bank.threads=16", "--output", tmp_path / "plan.json") == 0
        printed = capsys.readouterr().out
        (outcome,) = {
            (plan["outcome"]["reencoding"], plan["outcome"]["step_seconds"])
            for plan in json.loads((tmp_path / "plan.json").read_text())["plans"]
            if plan["outcome"]["layout"]["index"] == "ivf_flat"
        }
        between = 0.5 * float(clips) / (512 * 16)
        assert outcome[1] == pytest.approx(1 + outcome[0] / between)
        assert f"every {between:.3g} steps training stops for {outcome[0]:.3g} s" in printed
        steps[clips] = outcome[1]
    assert steps["1e6"] - 1 == pytest.approx(100 * (steps["1e8"] - 1))


def test_more_threads_need_fewer_actors(tmp_path):
    actors = []
    for threads in (1, 16):
        assert run("--workers", "8", "--rows", "1e6", f"bank.threads={threads}", "--output", "plan.json") == 0
        plans = json.loads(Path("plan.json").read_text())["plans"]
        layout = next(plan["outcome"]["layout"] for plan in plans if plan["outcome"]["layout"]["index"] == "flat")
        actors.append(layout["shards"] * layout["replicas"])
    assert actors[1] < actors[0]


@pytest.mark.parametrize(
    ("text", "values"),
    [("512", [512]), ("8..64", [8, 16, 32, 64]), ("8..50", [8, 16, 32, 50]), ("1e6..2e6", [10**6, 2 * 10**6])],
)
def test_a_span_ends_with_its_last_value(text, values):
    assert span(text, 2, "workers") == values


@pytest.mark.parametrize("text", ["", "..", "0", "nan", "inf", "8..", "1..1e99"])
def test_other_spans_are_refused(text):
    if text == "8..":
        assert span(text, 2, "workers") == [8]
    else:
        with pytest.raises(InputError, match="--workers"):
            span(text, 2, "workers")
