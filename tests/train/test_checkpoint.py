"""Checkpoints: what comes back, what is refused, and that nothing on disk can run code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from ask_dist import config as configuration
from ask_dist.bank import snapshot, store
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.errors import InputError
from ask_dist.train import checkpoint

LINEAGE = "0123456789abcdef"
ENGINE = {"model.weight": torch.arange(6.0).reshape(2, 3), "global_step": torch.tensor(7)}
REFINER = {"ids": np.array([2**63 - 1, -5]), "audio": np.eye(2, dtype=np.float16).T, "generation": np.array(3)}
CONTENT = {
    "engine": ENGINE,
    "arrays": {"refiner": REFINER},
    "samples_seen": 448,
    "skipped_steps": 3,
    "lineage": LINEAGE,
}


def save_bank(folder: Path) -> str:
    bank = KnowledgeBank(dim=2, capacity=9)
    bank.upsert(np.array([5, 7, 8]), np.eye(3, 2), np.eye(3, 2), None, step=3)
    return snapshot.read_manifest(store.save(folder, bank.state(), keep=1)).digest


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoint.save(tmp_path, banks={"bank": save_bank}, global_step=7, **CONTENT)
    return tmp_path


def rewrite(folder: Path, **fields: Any) -> None:
    """Changes fields of the manifest."""
    path = folder / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_was_saved_comes_back(saved):
    manifest = checkpoint.load_manifest(saved, LINEAGE)
    assert (manifest.global_step, manifest.samples_seen, manifest.lineage) == (7, 448, LINEAGE)
    assert manifest.skipped_steps == 3
    engine, refiner = checkpoint.load_engine(saved), checkpoint.load_arrays(saved, "refiner")
    assert set(engine) == set(ENGINE)
    for name, tensor in ENGINE.items():
        torch.testing.assert_close(engine[name], tensor, atol=0, rtol=0)
    assert set(refiner) == set(REFINER)
    for name, array in REFINER.items():
        np.testing.assert_array_equal(refiner[name], array)
        assert (refiner[name].dtype, refiner[name].shape) == (array.dtype, array.shape)
    assert checkpoint.load_arrays(saved, "another") == {}
    np.testing.assert_array_equal(store.load(saved / "bank")["ids"], [5, 7, 8])
    assert checkpoint.bank_folders(saved) == [str(saved / "bank")]


@pytest.mark.parametrize("name", [checkpoint.ENGINE, "refiner.safetensors"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_flipped_byte_is_refused(saved, name, place):
    content = bytearray((saved / name).read_bytes())
    content[place] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is missing or damaged"):
        checkpoint.load_manifest(saved, LINEAGE)


def test_a_missing_file_is_refused(saved):
    (saved / "refiner.safetensors").unlink()
    with pytest.raises(InputError, match=r"refiner\.safetensors is missing or damaged"):
        checkpoint.load_manifest(saved, LINEAGE)


@pytest.mark.parametrize("name", ["snapshot-000000000.json", "snapshot-000000000.safetensors"])
@pytest.mark.parametrize("change", [b"", None, b"flipped"])
def test_a_bank_that_is_not_the_one_that_was_saved_is_refused(saved, name, change):
    path = saved / "bank" / name
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.unlink()
    if change is not None:
        path.write_bytes(content if change else b"")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="bank is missing or damaged"):
        checkpoint.load_manifest(saved, LINEAGE)


def test_another_whole_snapshot_is_refused(saved):
    store.save(saved / "bank", KnowledgeBank(dim=2, capacity=9).state())
    with pytest.raises(checkpoint.DamagedCheckpoint, match="is another snapshot than that of the checkpoint"):
        checkpoint.load_manifest(saved, LINEAGE)


def test_a_checkpoint_of_another_lineage_is_refused(saved):
    with pytest.raises(InputError, match="another configuration"):
        checkpoint.load_manifest(saved, "f" * 16)


def test_a_folder_without_manifest_is_no_checkpoint(saved):
    (saved / checkpoint.MANIFEST).unlink()
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load_manifest(saved, LINEAGE)


def test_another_format_is_refused(saved):
    path = saved / checkpoint.MANIFEST
    manifest = json.loads(path.read_text()) | {"format": 1}
    del manifest["snapshots"]  # as that format was
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="checkpoint format 1, this version reads 2"):
        checkpoint.load_manifest(saved, LINEAGE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{",
        b'{"format": 2}',
        b'{"global_step": 1, "samples_seen": 1, "lineage": "0123456789abcdef", "sha256": [], "snapshots": {}}',
        b'{"global_step": "x", "samples_seen": 1, "lineage": "0123456789abcdef", "sha256": {}, "snapshots": {}}',
    ],
)
def test_a_manifest_that_is_none_is_refused_in_one_line(saved, content):
    (saved / checkpoint.MANIFEST).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        checkpoint.load_manifest(saved, LINEAGE)
    assert "\n" not in str(refusal.value)


def test_a_manifest_that_vouches_for_no_engine_is_refused(saved):
    rewrite(saved, sha256={"refiner.safetensors": digest(saved / "refiner.safetensors")})
    with pytest.raises(InputError, match=r"engine\.safetensors"):
        checkpoint.load_manifest(saved, LINEAGE)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", ".", "", "a/../../outside", "nul\0byte"])
def test_names_in_a_manifest_lead_nowhere_else(saved, tmp_path, name):
    outside = tmp_path.parent / "outside"
    outside.write_bytes(b"not of the checkpoint")
    engine = digest(saved / checkpoint.ENGINE)
    rewrite(saved, sha256={checkpoint.ENGINE: engine, name: digest(outside)})
    with pytest.raises(InputError, match="missing or damaged"):
        checkpoint.load_manifest(saved, LINEAGE)
    save_bank(tmp_path.parent / "outside-bank")
    rewrite(saved, sha256={checkpoint.ENGINE: engine}, snapshots={f"{name}-bank": "0" * 64})
    with pytest.raises(InputError, match="missing or damaged"):
        checkpoint.load_manifest(saved, LINEAGE)


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_under_any_name_never_runs(saved, tmp_path):
    marker = tmp_path.parent / "the-pickle-ran"
    payload = pickle.dumps(Malice(marker))
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        path.write_bytes(payload)
    with pytest.raises(InputError):
        checkpoint.load_manifest(saved, LINEAGE)
    with pytest.raises(SafetensorError):
        checkpoint.load_engine(saved)
    with pytest.raises(SafetensorError):
        checkpoint.load_arrays(saved, "refiner")
    with pytest.raises(InputError):
        store.load(saved / "bank")
    assert not marker.exists()
    pickle.loads(payload)  # the payload itself works
    assert marker.exists()


def config_with(*overrides: str) -> configuration.Config:
    tree: dict[str, Any] = {"name": "run", "data": {"train": "shards/train"}}
    for override in overrides:
        configuration.apply_override(tree, override)
    return configuration.parse(tree)


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "optimization.epochs=99",
        "optimization.log_every=3",
        "optimization.zero_stage=3",
        "optimization.ema_decay=0.99",
        "model.audio.lora=null",
        "cluster.max_failures=0",
        "data.test=elsewhere",
        "bank.threads=2",
        "model.from=runs/moved",
        "model.audio.source=encoders/moved",
        "model.text.source=encoders/moved",
        "augment.mix_share=0",
    ],
)
def test_what_may_change_on_resume_keeps_the_lineage(override):
    assert checkpoint.lineage(config_with(override), "data") == checkpoint.lineage(config_with(), "data")


def test_the_same_global_batch_on_fewer_workers_keeps_the_lineage():
    fewer = config_with("cluster.num_workers=1", "optimization.micro_batch_size=64")
    assert checkpoint.lineage(fewer, "data") == checkpoint.lineage(config_with(), "data")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.embedding_dim=128",
        "model.text.lora.rank=4",
        "optimization.loss=siglip",
        "knowledge.neighbours=4",
        "optimization.micro_batch_size=64",
        "data.lanes=4",
        "data.shuffle_window=8",
        "data.sample_rate=48000",
        "data.clip_seconds=2",
        "data.length_step=0.1",
        "augment.time_mask=0.1",
        "augment.mix_share=0.1",
    ],
)
def test_what_must_not_change_on_resume_changes_the_lineage(override):
    assert checkpoint.lineage(config_with(override), "data") != checkpoint.lineage(config_with(), "data")


def test_other_shards_change_the_lineage():
    assert checkpoint.lineage(config_with(), "data") != checkpoint.lineage(config_with(), "other data")


def write(run: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.write(run, keep, banks={"bank": save_bank}, global_step=step, **CONTENT)


def damage(folder: Path) -> None:
    (folder / checkpoint.ENGINE).write_bytes(b"cut short")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir())


def test_as_many_checkpoints_stay_as_are_to_be_kept(tmp_path):
    for step in (90, 100, 110):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint_000000100", "checkpoint_000000110"]
    write(tmp_path, 120, keep=1)
    assert names(tmp_path) == ["checkpoint_000000120"]


def test_a_run_goes_on_from_its_newest_intact_checkpoint(tmp_path):
    assert checkpoint.newest_intact(tmp_path, LINEAGE) == (None, [])
    first, second, third = (write(tmp_path, step) for step in (10, 20, 30))
    assert checkpoint.newest_intact(tmp_path, LINEAGE) == (third, [])
    damage(third)
    found, problems = checkpoint.newest_intact(tmp_path, LINEAGE)
    assert found == second
    assert [str(third / checkpoint.ENGINE) in problem for problem in problems] == [True]
    shutil.rmtree(second)
    assert checkpoint.newest_intact(tmp_path, LINEAGE)[0] == first


def test_no_intact_checkpoint_is_no_reason_to_begin_anew(tmp_path):
    damage(write(tmp_path, 10))
    with pytest.raises(InputError, match=r"engine\.safetensors is missing or damaged .* no intact one .* --overwrite"):
        checkpoint.newest_intact(tmp_path, LINEAGE)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    write(tmp_path, 10, keep=1)
    damage(write(tmp_path, 30))
    assert write(tmp_path, 20, keep=1) == checkpoint.newest_intact(tmp_path, LINEAGE)[0]
    assert write(tmp_path, 30, keep=1) == checkpoint.newest_intact(tmp_path, LINEAGE)[0]
    assert names(tmp_path) == ["checkpoint_000000030"]


def test_a_full_disk_costs_no_checkpoint(tmp_path, small_disk):
    kept = write(small_disk, 10)
    large = {"model.weight": torch.zeros(2**20)}
    with pytest.raises(InputError, match=r"checkpoint_000000020 can't be written: No space left on device"):
        checkpoint.write(small_disk, 1, banks={"bank": save_bank}, global_step=20, **CONTENT | {"engine": large})
    assert names(small_disk) == [kept.name]
    assert checkpoint.newest_intact(small_disk, LINEAGE) == (kept, [])


def test_what_a_killed_run_left_unfinished_is_no_checkpoint(tmp_path):
    unfinished = tmp_path / checkpoint.FOLDER / checkpoint.UNFINISHED
    unfinished.mkdir(parents=True)
    (unfinished / checkpoint.ENGINE).write_bytes(b"half")
    assert checkpoint.newest_intact(tmp_path, LINEAGE) == (None, [])
    assert write(tmp_path, 10) == checkpoint.newest_intact(tmp_path, LINEAGE)[0]
    assert not unfinished.exists()
