"""The bank on disk: what was saved comes back, and anything else is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ask_dist.bank import store
from ask_dist.bank.memory import Commit, KnowledgeBank
from ask_dist.bank.prototypes import unit_rows
from ask_dist.errors import InputError


@pytest.fixture
def state(rng):
    bank = KnowledgeBank(dim=8, capacity=100)
    bank.upsert(np.arange(40), unit_rows(rng.normal(size=(40, 8))), unit_rows(rng.normal(size=(40, 8))), None, step=3)
    halves = [(bank.snapshot().audio[:4], bank.snapshot().text[:4])]
    bank.commit(Commit.of_prototypes(halves, bank.snapshot()))
    return bank.state()


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


def test_a_second_save_replaces_the_first(tmp_path, state):
    store.save(tmp_path, state)
    state["newest_step"] = np.array(77)
    store.save(tmp_path, state)
    assert int(store.load(tmp_path)["newest_step"]) == 77
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_before_the_manifest_leaves_the_old_store(tmp_path, state):
    store.save(tmp_path, state)
    (tmp_path / "bank-0123456789abcdef.safetensors").write_bytes(b"the data of a save that got no further")
    np.testing.assert_array_equal(store.load(tmp_path)["ids"], state["ids"])


@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_flipped_byte_is_refused(tmp_path, state, position):
    store.save(tmp_path, state)
    (data,) = tmp_path.glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[position] ^= 0xFF
    data.write_bytes(content)
    with pytest.raises(InputError, match="does not match its checksum"):
        store.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": 41}, "its manifest says"), ({"format": 2}, "bank format 2"), ({"sha256": "0"}, "checksum")],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, state, change, message):
    store.save(tmp_path, state)
    manifest = tmp_path / store.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        store.load(tmp_path)


@pytest.mark.parametrize("manifest", [None, "", "{}", "[]", "not json"])
def test_no_store_or_half_a_store_is_refused(tmp_path, state, manifest):
    if manifest is not None:
        (tmp_path / store.MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match="holds no readable bank"):
        store.load(tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path, state):
    store.save(tmp_path / "elsewhere", state)
    manifest = json.loads((tmp_path / "elsewhere" / store.MANIFEST).read_text())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / store.MANIFEST).write_text(json.dumps({**manifest, "file": f"../elsewhere/{manifest['file']}"}))
    with pytest.raises(InputError, match="holds no readable bank"):
        store.load(inside)
