"""The command line in this process: exit codes, and one line on stderr for what the user can mend."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist import cli
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip
from tests.data.server import serving

RATE = 16000
COMMANDS = ("train", "check", "evaluate", "export", "search", "tune", "plan", "pack", "corpus", "shards")


def run(*arguments: str | Path) -> int:
    """The exit code of `ask-dist arguments`."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def tone(number: int) -> Clip:
    """A second of a sine an octave's third higher for each number."""
    hertz = 220.0 * 2.0 ** (number / 3)
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE, dtype=np.float32)
    return Clip(f"tone-{number}", wave, RATE, (f"a tone of {hertz:.0f} hertz",), (f"octave {number // 3}",))


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """A real corpus of 16 clips in 4 training shards, and 4 in one test shard."""
    folder = tmp_path_factory.mktemp("tones")
    write_shards([tone(number) for number in range(16)], folder / "train", "train", clips_per_shard=4)
    write_shards([tone(number) for number in range(4)], folder / "test", "test")
    return folder


@pytest.fixture
def config(tones, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"""
name: tones
output_dir: {tmp_path / "runs"}
data: {{train: {tones / "train"}, test: {tones / "test"}, clip_seconds: 1.0, lanes: 2}}
model: {{embedding_dim: 16, audio: {{width: 8, mel_bins: 16}}, text: {{width: 16, layers: 1, vocabulary: 300}}}}
optimization: {{micro_batch_size: 4, epochs: 1}}
""")
    return path


@pytest.fixture
def refused(capsys):
    """Checks that a command exits with 2 and says why in one line, and returns that line."""

    def check(*arguments: str | Path) -> str:
        code = run(*arguments)
        lines = capsys.readouterr().err.splitlines()
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return check


def test_help_names_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert run(command, "-h") == 0
    assert "Usage: ask-dist" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.parametrize("arguments", [("nonsense",), ("train",), ("search", "run", "-k", "0")])
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "check"])
def test_an_unknown_config_file(command, tmp_path, refused):
    assert "no configuration file" in refused(command, tmp_path / "missing.yaml")


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_misspelt_key_names_the_nearest(command, config, refused):
    line = refused(command, config, "optimization.epoch=3")
    assert "unknown key optimization.epoch; did you mean optimization.epochs?" in line


def test_square_brackets_in_a_message_are_shown_as_they_are(config, refused):
    assert "bank.prototypes.0=0" in refused("train", config, "bank.prototypes=[0]")
    assert "seed='[bold]'" in refused("train", config, "seed='[bold]'")


@pytest.mark.parametrize("command", ["train", "check"])
def test_missing_shards_name_the_folder(command, config, tmp_path, refused):
    line = refused(command, config, f"data.train={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in line


@pytest.mark.parametrize("command", ["train", "check"])
def test_fewer_shards_than_workers_names_both_numbers(command, config, tones, refused):
    line = refused(command, config, f"data.train={tones / 'test'}")
    assert "1 shards for 2 workers" in line
    assert "cluster.num_workers=1" in line


@pytest.mark.parametrize("command", ["train", "check"])
def test_an_output_folder_that_cant_be_made(command, config, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    line = refused(command, config, f"output_dir={tmp_path / 'file'}")
    assert "output_dir=" in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_under_shards_is_one_line(tmp_path, small_disk, refused):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30 * RATE)
    lines = ["audio,caption"]
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", noise, RATE)
        lines.append(f"{number}.wav,noise number {number}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    line = refused("pack", tmp_path / "table.csv", small_disk / "shards")
    assert f"{small_disk / 'shards'} can't be written: No space left on device (" in line
    assert "of 1 MiB free)" in line


def test_pack_takes_a_published_table_and_names_what_it_lacks(tmp_path, capsys, refused):
    (tmp_path / "meta").mkdir()
    soundfile.write(tmp_path / "audio.wav", np.sin(np.arange(RATE) / 10), RATE)
    table = tmp_path / "meta" / "esc50.csv"
    table.write_text("filename,fold,target,category,esc10,src_file,take\naudio.wav,1,0,dog,True,1,A\n")
    assert run("pack", table, tmp_path / "out", "--recipe", "esc50", "--audio-folder", tmp_path) == 0
    assert "1 clips" in capsys.readouterr().out
    line = refused("pack", table, tmp_path / "out", "--recipe", "audiocaps", "--audio-folder", tmp_path)
    assert "no column audiocap_id" in line
    table = tmp_path / "fsd_final.json"
    table.write_text(json.dumps({"data": [{"id": name, "caption": "a tone"} for name in ("audio", "other")]}))
    (tmp_path / "black.json").write_text(json.dumps({"FreeSound": ["other", "third"]}))
    options = ("--recipe", "wavcaps", "--audio-folder", tmp_path, "--beside", tmp_path / "black.json")
    assert run("pack", table, tmp_path / "freesound", *options) == 0
    assert "black.json: 1 of 2 rows are left out" in capsys.readouterr().out
    assert "only --recipe audiosetcaps, clotho" in refused("pack", table, tmp_path / "out", "--beside", table)
    assert "no audio folder" in refused("pack", table, tmp_path / "out", "--audio-folder", tmp_path / "nowhere")


def test_pack_tells_what_was_out_of_reach_and_writes_into_local_folders_alone(tmp_path, capsys, refused):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(RATE) / 10), RATE)
    with serving(tmp_path) as server:
        server.faults = {"/b.wav": ["503"] * 2}
        (tmp_path / "t.csv").write_text(f"audio,caption\na.wav,a\n{server.url}/b.wav,b\n")
        packed = ("pack", tmp_path / "t.csv", tmp_path / "out", "--tries", "1")
        assert run(*packed) == 0
        assert "1 skipped (see " in (line := capsys.readouterr().out)
        assert line.endswith(", 1 of them out of reach: the same command tries these again\n")
        soundfile.write(tmp_path / "b.wav", np.sin(np.arange(RATE) / 20), RATE)
        server.faults = {}
        assert run(*packed) == 0
        assert "2 clips, 0.00 hours, 2 shards (1 of" in capsys.readouterr().out
    line = refused("pack", tmp_path / "t.csv", "s3://bucket/shards")
    assert line == "error: s3:/bucket/shards: shards are written into local folders; pack into one and copy it there"


def test_shards_are_verified_shown_and_measured(tones, tmp_path, capsys, refused):
    folder = tmp_path / "train"
    shutil.copytree(tones / "train", folder)
    assert run("shards", "verify", folder, "--decode") == 0
    assert "4 shards, 16 clips, all as packed" in capsys.readouterr().out
    assert run("shards", "show", folder, "tone-7", "--save", tmp_path / "hits") == 0
    assert "a tone of 1109 hertz" in capsys.readouterr().out
    assert soundfile.info(tmp_path / "hits" / "tone-7.flac").frames == RATE
    assert run("shards", "show", folder) == 0
    assert "tone-9" in capsys.readouterr().out
    assert "no clip 'tone-99'" in refused("shards", "show", folder, "tone-99")
    assert run("shards", "stats", folder, "--output", tmp_path / "s.json", "--plot", tmp_path / "s.png") == 0
    assert "loudness" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["clips"] == 16
    (folder / "train-000002.tar").unlink()
    assert "1 problems, the first: train-000002.tar: is listed" in refused("shards", "verify", folder)


def test_shards_where_a_file_is_in_the_way(tmp_path, refused):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(RATE) / 10), RATE)
    (tmp_path / "table.csv").write_text("audio,caption\na.wav,a tone")
    assert "can't be written" in refused("pack", tmp_path / "table.csv", tmp_path / "a.wav")
    assert "can't be written" in refused("corpus", "build", "sampled-scenes", tmp_path / "a.wav")


def test_an_existing_run_is_not_written_over(config, tmp_path, refused):
    earlier = tmp_path / "runs" / "tones" / "metrics.jsonl"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}\n")
    line = refused("train", config)
    assert "--resume" in line
    assert "--overwrite" in line
    assert earlier.read_text() == "{}\n"


def test_search_and_evaluate_want_a_finished_run(tmp_path, refused):
    assert f"{tmp_path} holds no finished run" in refused("search", tmp_path, "three notes")
    assert f"{tmp_path} holds no finished run" in refused("evaluate", tmp_path)
    assert "one of the two" in refused("search", tmp_path)


def test_tune_wants_a_sweep(config, tmp_path, refused):
    assert f"{config}: base is missing" in refused("tune", config)  # a run is no sweep
    assert "missing.yaml" in refused("tune", tmp_path / "missing.yaml")


def test_check_finds_a_real_corpus_ready_and_writes_nothing(config, tmp_path, capsys):
    assert run("check", config, "data.length_step=0.1") == 0
    text = capsys.readouterr().out
    assert "ready" in text
    assert "2 workers, global batch 8" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_check_looks_into_some_of_very_many_shards(config, tmp_path, capsys):
    rng = np.random.default_rng(0)
    sounds = [
        Clip(f"noise-{n}", rng.normal(scale=0.1, size=800).astype(np.float32), RATE, (f"noise {n}",)) for n in range(70)
    ]
    write_shards(sounds, tmp_path / "many", "train", clips_per_shard=1)
    write_shards([sounds[0], sounds[69], sounds[1]], tmp_path / "test", "test")
    assert run("check", config, f"data.train={tmp_path / 'many'}", f"data.test={tmp_path / 'test'}") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "64 of 70 training shards are looked into; all of them: in the run," in told
    assert run("check", config, f"data.train={tmp_path / 'many'}", f"data.held_out=[{tmp_path / 'test'}]") == 0
    assert "train-000069.tar noise-69: held out: its key is in held_out" in " ".join(capsys.readouterr().out.split())
    assert "train-000069.tar noise-69: held out: its key is in test" in told


def test_check_wants_what_is_held_out_to_be_there(config, refused):
    assert "no folder /nowhere" in refused("check", config, "data.held_out=[/nowhere]")
    assert "name at least one folder" in refused("check", config, "data.held_out=[]")


def test_check_names_what_cannot_be_held_out(config, tmp_path, tones, capsys):
    damaged = shutil.copytree(tones / "test", tmp_path / "test")
    (tar, *_) = sorted(damaged.glob("*.tar"))
    tar.write_bytes(bytes(1024))
    assert run("check", config, f"data.test={damaged}") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "clips of the test split can't be read and so not be held out of training and banks, the first in" in told


def test_check_refuses_more_cores_than_there_are(config, refused):
    line = refused("check", config, "cluster.cpus_per_worker=100000")
    assert "200000 CPU" in line
    assert "cluster.num_workers" in line


def test_ctrl_c_exits_with_1_and_one_line(tmp_path):
    path = tmp_path / "never.yaml"
    os.mkfifo(path)
    # A parent in the background may have left SIGINT ignored, and children inherit that.
    code = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from ask_dist.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        with open(path, "w"):  # opens only once the command has begun to read its configuration
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            message = process.stderr.read()
        assert process.wait() == 1
    assert message.splitlines() == ["interrupted; run the command again to go on (train and tune: with --resume)"]
