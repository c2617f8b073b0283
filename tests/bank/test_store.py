"""The bank on disk: what was saved comes back, and anything else is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from ask_dist.bank import snapshot, store
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.errors import InputError


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path, state):
    store.save(tmp_path / "bank", state)
    loaded = store.load(tmp_path / "bank")
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(loaded[name], value)
    restored = KnowledgeBank.from_state(loaded, dim=8, capacity=100)
    assert len(restored) == 40
    assert restored.prototypes is not None


def test_an_empty_bank_comes_back(tmp_path):
    store.save(tmp_path, KnowledgeBank(dim=8, capacity=100).state())
    assert len(store.load(tmp_path)["ids"]) == 0


def test_the_newest_and_the_one_before_stay(tmp_path, state):
    paths = []
    for step in (5, 6, 77):
        state["newest_step"] = np.array(step)
        paths.append(store.save(tmp_path, state))
    assert store.snapshots(tmp_path) == paths[:0:-1]
    assert len(files_of(tmp_path)) == 4
    assert int(store.load(tmp_path)["newest_step"]) == 77


def test_a_crash_before_the_manifest_leaves_the_snapshot_before(tmp_path, state):
    path = store.save(tmp_path, state)
    (tmp_path / "snapshot-000000001.safetensors").write_bytes(b"the data of a save that got no further")
    np.testing.assert_array_equal(store.load(tmp_path)["ids"], state["ids"])
    assert store.save(tmp_path, state) > path
    assert len(files_of(tmp_path)) == 4  # what had no manifest is gone
    np.testing.assert_array_equal(store.load(tmp_path)["ids"], state["ids"])


def test_a_linked_snapshot_stays_when_its_first_name_goes(tmp_path, state):
    path = store.save(tmp_path, state)
    store.link(path, tmp_path, 7)
    linked, first = store.snapshots(tmp_path)
    assert snapshot.verify(linked).digest == snapshot.read_manifest(first).digest
    path.with_suffix(".safetensors").unlink()
    np.testing.assert_array_equal(store.load(tmp_path)["audio"], state["audio"])


def test_a_damaged_snapshot_gives_way_to_the_one_before(tmp_path, state, caplog):
    first = store.save(tmp_path, state)
    state["newest_step"] = np.array(77)
    second = store.save(tmp_path, state)
    second.with_suffix(".safetensors").write_bytes(b"cut")
    with caplog.at_level(logging.WARNING):
        assert int(store.load(tmp_path)["newest_step"]) == 3
    (said,) = caplog.messages
    assert "snapshot-000000001.safetensors has 3 bytes" in said
    assert f"{first.name} is used" in said
    first.unlink()
    with pytest.raises(InputError, match=r"snapshot-000000001\.safetensors has 3 bytes"):
        store.load(tmp_path)


def test_a_damaged_snapshot_takes_no_good_one_s_place(tmp_path, state):
    first, second = store.save(tmp_path, state), store.save(tmp_path, state)
    second.with_suffix(".safetensors").write_bytes(b"cut")
    third = store.save(tmp_path, state)
    assert store.snapshots(tmp_path) == [third, first]
    assert len(files_of(tmp_path)) == 4
    third.with_suffix(".safetensors").write_bytes(b"cut")
    np.testing.assert_array_equal(store.load(tmp_path)["ids"], state["ids"])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_gives_way_to_the_snapshot_before(tmp_path, state, caplog, suffix, make):
    """A pipe that nobody writes to: who opens it waits."""
    store.save(tmp_path, state)
    odd = store.save(tmp_path, state).with_suffix(suffix)
    odd.unlink()
    make(odd)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(store.load(tmp_path)["ids"], state["ids"])
    (said,) = caplog.messages
    assert f"{odd} " in said
    assert "it is no regular file" in said
    assert "\n" not in said


@pytest.mark.timeout(60)
def test_a_pipe_of_no_bytes_as_its_manifest_says_is_no_data(tmp_path, state):
    path = store.save(tmp_path, state)
    told = snapshot.read_manifest(path).model_copy(update={"bytes": 0, "blocks": ()})
    path.write_text(f"{told.model_dump_json()}\n{told.digest}\n")
    path.with_suffix(".safetensors").unlink()
    os.mkfifo(path.with_suffix(".safetensors"))
    with pytest.raises(snapshot.DamagedSnapshot, match="it is no regular file"):
        store.load(tmp_path)


@pytest.mark.parametrize("manifest", [None, "", "{}", "[]", "not json", "{" * 100_000])
def test_no_snapshot_or_half_a_one_is_refused(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / "snapshot-000000000.json").write_text(manifest)
    with pytest.raises(InputError, match=r"holds no readable bank|is no manifest of a bank"):
        store.load(tmp_path)
