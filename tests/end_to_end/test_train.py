"""Whole runs by the command, as a user starts them: real Ray, DeepSpeed, FAISS, torch-geometric and WebDataset."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ask_dist.data.shards import ShardList
from tests.end_to_end.audit import EPOCH, audited, check_audit
from tests.end_to_end.command import ask_dist, environment

pytestmark = pytest.mark.ray

BAD = "eval/validation/bad_samples"
SCORES = {"R@1", "R@5", "R@10", "mAP@10", "median_rank"}


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_checkpoint(run: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if list(run.glob("checkpoints/checkpoint_*/manifest.json")):
            return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint; the process returned {process.poll()}")


def bank_process(run: Path, process: subprocess.Popen[str], but: int = 0, seconds: float = 120) -> int:
    """The process that writes the bank's journal, once there is another than `but` and the run has logged a step."""
    logged, end = len(rows(run)), time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        for opened in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found = int(opened.parts[2])
                if opened.readlink().match(f"{run}/bank/0/journal-*.bin") and found != but and len(rows(run)) > logged:
                    return found
        time.sleep(0.1)
    raise AssertionError(f"no bank; the process returned {process.poll()}")


def test_a_run_learns_reports_and_can_be_searched_and_scored(finished: Path, tones: Path, tmp_path: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert set(report["text_to_audio"]) == set(report["audio_to_text"]) == SCORES
    assert report["text_to_audio"]["R@10"] > 50.0  # chance is 25
    assert {"head", "mid", "tail"} <= set(report["long_tail"])
    assert report["bank"]["rows"] == 160
    assert report["bank"]["upserts"] >= 160
    assert report["refine"]["generations"] >= 1
    assert report["refine"]["failures"] == 0
    assert report["quarantine"]["count"] == 0
    assert report["diagnostics"]["out_of_batch_gradient_share"] > 0
    assert report["throughput"]["samples_seen"] == 50 * 160
    logged = rows(finished)
    assert any(row.get("train/knowledge_used") for row in logged)
    assert any("eval/validation/text_to_audio_R@1" in row for row in logged)
    assert "<svg" in (finished / "report.html").read_text()

    again = ask_dist("train", finished / "config.yaml", "--resume")
    assert again.returncode == 0
    assert "is finished" in again.stdout
    refused = ask_dist("train", finished / "config.yaml")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr

    scored = ask_dist("evaluate", finished, "--output", tmp_path / "scores.json")
    assert scored.returncode == 0, scored.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["text_to_audio"]["R@10"] == pytest.approx(report["text_to_audio"]["R@10"], abs=5.1)

    found = ask_dist("search", finished, "a pulsing tone, high", "-k", "3", "--save", tmp_path / "hits")
    assert found.returncode == 0, found.stderr
    hits = sorted((tmp_path / "hits").glob("*.flac"))
    assert len(hits) == 3
    by_sound = ask_dist("search", finished, "--audio", hits[0], "-k", "1")
    assert by_sound.returncode == 0, by_sound.stderr
    assert hits[0].stem.removeprefix("01-") in by_sound.stdout  # a clip finds itself


def test_a_killed_run_goes_on_with_other_workers_stage_and_bank_and_survives_its_death(
    config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tones"
    command = [str(Path(sys.executable).with_name("ask-dist")), "train", str(config_file), "optimization.epochs=40"]
    command.append("data.audit=true")
    split = [*command, "bank.shards=2", "bank.replicas=2"]
    first = subprocess.Popen(split, start_new_session=True, env=environment(), stdout=subprocess.DEVNULL)
    wait_for_checkpoint(run, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    checkpoints = sorted(run.glob("checkpoints/checkpoint_*/manifest.json"))
    position = json.loads(checkpoints[-1].read_text())["global_step"]
    before = len(rows(run))

    fewer = ["cluster.num_workers=1", "optimization.train_batch_size=32", "optimization.zero_stage=2"]
    again = [*command, "bank.durable=true", *fewer, "--resume"]
    resumed = subprocess.Popen(
        again, start_new_session=True, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    bank = bank_process(run, resumed)
    os.kill(bank, signal.SIGKILL)
    bank_process(run, resumed, but=bank)  # Ray has restarted it, and training goes on
    _, stderr = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, stderr
    report = json.loads((run / "report.json").read_text())
    assert report["throughput"]["samples_seen"] == 40 * 160
    taken = [step for step, _ in audited(run)]
    turns = [(last, step) for last, step in itertools.pairwise(taken) if step != last + 1]
    # Back to a checkpoint, once; perhaps to a later one, since workers outlive the driver by some steps.
    assert all(position <= step <= last and step % (2 * EPOCH) == 0 for last, step in turns)
    assert len(turns) <= 1
    check_audit(run, 40, repeated=bool(turns))
    steps = [row["step"] for row in rows(run)[before:] if "train/loss" in row]
    assert position < steps[0] <= position + 11
    assert steps == sorted(steps)  # the workers were not restarted
    after = [row for row in rows(run)[before:] if "bank/durable" in row]
    assert {row["bank/rows"] for row in after} == {160}
    assert {row["bank/durable"] for row in after} == {1}
    assert report["bank"]["rows"] == 160
    checkpoints = list(run.glob("checkpoints/checkpoint_*/bank/snapshot-*.safetensors"))
    assert any(path.samefile(other) for path in checkpoints for other in run.glob("bank/0/snapshot-*.safetensors"))

    other = ask_dist("train", config_file, "optimization.epochs=40", "seed=1", "--resume")
    assert other.returncode == 2
    assert "another configuration" in other.stderr


def test_bad_samples_are_named_and_too_many_end_the_run(config_file: Path, tones: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tones / "train", damaged)
    shard = damaged / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:200_000])
    shutil.copytree(tones / "validation", half := tmp_path / "half")
    for held_out in half.glob("*.tar"):  # all that the second of the workers is to evaluate
        held_out.write_bytes(held_out.read_bytes()[: held_out.stat().st_size * 2 // 5])

    tolerant = ask_dist(
        "train",
        config_file,
        f"data.train={damaged}",
        f"data.validation={half}",
        "data.max_bad_share=0.5",
        "optimization.epochs=2",
        "name=tolerant",
    )
    assert tolerant.returncode == 0, tolerant.stderr
    (bad,) = [row[BAD] for row in rows(tmp_path / "runs/tolerant") if BAD in row]
    assert bad > ShardList.load(half).clips / 2
    unread = f"{bad:.0f} of 40 clips of the validation split can't be read and so not be held out"
    assert f"warning: {unread}" in tolerant.stdout
    report = json.loads((tmp_path / "runs" / "tolerant" / "report.json").read_text())
    assert report["quarantine"]["leaks"] == 0
    cut, gone, *others = report["quarantine"]["examples"]
    assert cut["reason"].startswith("can't hold out this clip of validation by more than its key: ")
    assert gone["reason"].startswith(f"can't hold out {bad - 1:.0f} clips of validation: ")
    assert any("train-000002.tar" in example["name"] for example in others)

    strict = ask_dist("train", config_file, f"data.train={damaged}", "optimization.epochs=2", "name=strict")
    assert strict.returncode == 2, strict.stdout
    assert "samples are bad" in strict.stderr
    assert strict.stderr.count("error:") == 1
    for name, further in (("tolerant", {"validation-000000.tar"}), ("strict", set())):
        lines = (tmp_path / "runs" / name / "quarantine.jsonl").read_text().splitlines()
        assert len(set(lines)) == len(lines)
        assert {json.loads(line)["shard"] for line in lines} == {"train-000002.tar"} | further
