"""Constants of the queueing model on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ask_dist.errors import InputError
from ask_dist.plan import constants
from ask_dist.plan.constants import FIGURE, SHIPPED, Constants, growth_of, load, ship


def bank_json(folder: Path, **changed: object) -> Path:
    """A bench's file with the shipped constants, some of them changed, and what the bench adds to a figure."""
    figure = load(SHIPPED).model_dump(mode="json") | changed | {"measured_in_seconds": 12.0}
    path = folder / "bank.json"
    path.write_text(json.dumps({FIGURE: figure, "million_rows": {"ratio": 0.5}}))
    return path


def test_what_ships_says_where_it_comes_from():
    shipped = load(SHIPPED)
    assert shipped.machine["cores"]
    assert shipped.measured
    assert set(shipped.upsert) == set(shipped.memory) == set(shipped.indexes(gpu=False))


def test_a_bench_becomes_what_ships(tmp_path):
    measured, target = bank_json(tmp_path, call=0.125), tmp_path / "constants.yaml"
    ship(measured, target)
    assert load(target) == load(measured)
    assert load(target).call == 0.125
    assert constants.COMMAND in target.read_text()


def test_a_bench_that_is_there_wins_over_what_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load() == load(SHIPPED)
    constants.MEASURED.parent.mkdir(parents=True)
    bank_json(constants.MEASURED.parent, call=0.125)
    assert load().call == 0.125
    constants.MEASURED.write_text(json.dumps({"million_rows": {"ratio": 0.5}}))  # another figure alone
    assert load() == load(SHIPPED)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.json", None, "no file"),
        ("bank.json", "{", "not readable"),
        ("bank.json", "[1]", "not a mapping"),
        ("bank.json", "{}", f"no figure {FIGURE}"),
        (
            "bank.json",
            json.dumps({FIGURE: dict.fromkeys(Constants.model_fields.keys() - {"call"})}),
            "older than call of",
        ),
        ("mine.yaml", "dim: -1", "dim=-1"),
        ("mine.yaml", "!!python/object/apply:os.system [echo]", "not readable"),
    ],
)
def test_a_file_without_constants_is_refused_in_one_line(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said) as refused:
        load(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_work_grows_with_the_rows_or_their_root_and_with_the_width():
    found = Constants(
        machine={},
        dim=100,
        neighbours=4,
        search={"flat": {"fixed": 1.0, "growth": 0.5}, "ivf_flat": {"fixed": 1.0, "growth": 0.5}},
        upsert={},
        snapshot=0,
        commit=0,
        look={"fixed": 0, "growth": 0},
        refine={"kernel": {"fixed": 2.0, "growth": 0.5}},
        prototypes={"fixed": 1.0, "growth": 0.25},
        prototype_rows=8,
        encoding=0.5,
        call=0,
        round_trip=0,
        submit=0,
        byte=0,
        memory={"flat": {"float16": {"fixed": 8, "growth": 4}}},
    )
    assert found.query_seconds("flat", 16, 100, gpu=False) == pytest.approx(9.0)
    assert found.query_seconds("ivf_flat", 16, 100, gpu=False) == pytest.approx(3.0)
    assert found.query_seconds("flat", 16, 200, gpu=False) == pytest.approx(18.0)
    assert found.bytes_a_row("flat", "float16", 10) == 48
    assert found.generation_seconds("kernel", 4, 100) == pytest.approx(6.0)
    assert found.generation_seconds("kernel", 100, 200) == pytest.approx(2 * (52.0 + 3.0))  # of 8 rows at most
    assert growth_of("ivf_pq", 100) == 10


def test_a_gpu_needs_constants_of_a_gpu():
    with pytest.raises(InputError, match="no search was measured with a GPU"):
        load(SHIPPED).indexes(gpu=True)
