from __future__ import annotations

import json
from pathlib import Path

from ask_dist.data.quarantine import BadSamples, write_quarantine


def record(key: str, shard: str = "a.tar") -> dict[str, str]:
    return {"shard": shard, "key": key, "reason": "silent ä"}


def test_each_bad_sample_is_counted_always_and_named_once(tmp_path: Path) -> None:
    bad = BadSamples(tmp_path / "quarantine.jsonl")
    bad.note(10, [])
    assert not bad.file.exists()
    bad.note(10, [record("x"), record("y")], [record("")])
    bad.note(10, [record("x")])
    assert (bad.delivered, bad.count) == (30, 3)
    assert bad.records == [record(""), record("x"), record("y")]
    assert [json.loads(line) for line in bad.file.read_text().splitlines()] == bad.records


def test_ranks_share_a_file_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    ranks = [BadSamples(path), BadSamples(path)]
    for number in range(20):
        ranks[number % 2].note(1, [record(f"clip-{number}")])
    ranks[0].note(1, [record("clip-1")])
    with path.open("a") as file:
        file.write('{"shard": "a.tar", "key": "cut sho\n[]\n{"other": 1}\n')
    whole = write_quarantine(path, [record("clip-3"), record("late")])
    assert whole == [*(record(f"clip-{number}") for number in range(20)), record("late")]
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole


def test_a_restarted_run_names_nothing_anew(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    BadSamples(path).note(2, [record("x"), record("y")])
    again = BadSamples(path)
    again.note(3, [record("y"), record("x"), record("z")])
    assert again.records == [record("y"), record("x"), record("z")]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["x", "y", "z"]


def test_a_run_without_bad_samples_has_no_file(tmp_path: Path) -> None:
    assert write_quarantine(tmp_path / "quarantine.jsonl", []) == []
    assert not list(tmp_path.iterdir())
