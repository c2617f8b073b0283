"""What a run may start from: weights that fit, and a bank that these very weights encoded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ask_dist import config as configuration
from ask_dist.bank import external
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import EXTERNAL
from ask_dist.data.pack import write_shards
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.shards import Clip, ShardList
from ask_dist.errors import InputError
from ask_dist.evaluate.external import CLIPS as CLIPS_FILE
from ask_dist.evaluate.external import build
from ask_dist.models.audio import ConvAudioEncoder, register_audio_encoder
from ask_dist.models.saved import digest, load_model, load_weights, save_model
from ask_dist.models.text import Vocabulary
from ask_dist.train.loop import load_shards
from ask_dist.train.start import check_start, new_model
from tests.finished_run import RATE, noise_corpus, untrained_run
from tests.models.conftest import CAPTIONS, needs_pretrained
from tests.models.towers import save_clap

CLIPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_corpus(tmp_path_factory.mktemp("corpus") / "train", CLIPS)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("runs") / "noise", corpus)


@pytest.fixture(scope="module")
def bank(corpus: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "noise"
    build(run, corpus, folder, Console(quiet=True))
    return folder


def check(run: Path, bank: Path | None, *overrides: str) -> None:
    given = [f"model.from={run}", *([f"bank.from={bank}"] if bank else []), *overrides]
    config = configuration.load(run / "config.yaml", given)
    check_start(config, load_shards(config))


def test_a_run_may_start_from_weights_and_the_bank_that_they_encoded(run, bank, tmp_path):
    check(run, None)
    check(run, bank, "model.dropout=0.3", "model.text.vocabulary=50")
    config = configuration.load(run / "config.yaml", [f"model.from={run}", f"bank.from={bank}"])
    (tmp_path / "again.yaml").write_text(configuration.dump(config))
    assert configuration.load(tmp_path / "again.yaml").anchored() == config.anchored()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.embedding_dim=16", r"^model\.embedding_dim is 16, but model\.from=.* was trained with 32: set that$"),
        ("model.text.heads=4", r"^model\.text\.heads is 4, but"),
        ("data.sample_rate=8000", r"^data\.sample_rate is 8000, but"),
        ("bank.capacity=23", r"holds 12 rows, and 12 clips are .*; bank\.capacity is 23, raise it to 24 at least$"),
    ],
)
def test_what_does_not_fit_is_named(run, bank, override, line):
    with pytest.raises(InputError, match=line):
        check(run, bank, override)


def test_a_bank_of_clips_that_the_run_is_tested_on_is_refused(run, bank, tmp_path):
    tested = noise_corpus(tmp_path / "test", 3)
    check(run, None, f"data.test={tested}")
    with pytest.raises(
        InputError, match=r"holds 3 clips of data\.validation, data\.test or data\.held_out; build it again"
    ):
        check(run, bank, f"data.test={tested}")


def test_so_is_one_of_their_sounds_under_other_keys(corpus, run, bank, tmp_path):
    shards = ShardList.load(corpus)
    (raw, *_) = read_shard(shards.paths[0], 3, 1)
    renamed = Clip("renamed", open_clip(raw, RATE)[0], RATE, ("no such words",))
    write_shards([renamed], tmp_path / "test", "test")
    with pytest.raises(
        InputError, match=r"holds 1 clips of data\.validation, data\.test or data\.held_out; build it again"
    ):
        check(run, bank, f"data.test={tmp_path / 'test'}")


def test_so_is_another_cut_of_their_recordings(run, tmp_path):
    for number, split in enumerate(("train", "test")):
        heard = np.random.default_rng(number).normal(scale=0.1, size=800).astype(np.float32)
        cut = Clip(f"cut-{split}", heard, RATE, (f"{split} words",), (), {"recording": "freesound:1"})
        write_shards([cut], tmp_path / split, split)
    build(run, tmp_path / "train", tmp_path / "cuts", Console(quiet=True))
    check(run, tmp_path / "cuts")
    for split in ("test", "held_out"):
        with pytest.raises(InputError, match=r"holds 1 clips of data\.validation, data\.test or data\.held_out; build"):
            check(run, tmp_path / "cuts", f"data.{split}={tmp_path / 'test'}")


def test_so_is_one_of_their_captions_without_audio(run, bank, tmp_path):
    heard = np.random.default_rng(9).normal(scale=0.1, size=800).astype(np.float32)
    write_shards([Clip("tested", heard, RATE, ("Noise, number 2.",))], tmp_path / "test", "test")
    check(run, bank, f"data.test={tmp_path / 'test'}")  # its clip-02 says the same of a sound of its own
    (tmp_path / "captions.txt").write_text("noise number 1\nnoise number 2\n")
    build(run, tmp_path / "captions.txt", tmp_path / "captions", Console(quiet=True))
    check(run, tmp_path / "captions")
    with pytest.raises(InputError, match=r"holds 1 captions without audio .* \('noise number 2'\); build it again"):
        check(run, tmp_path / "captions", f"data.test={tmp_path / 'test'}")
    (tmp_path / "captions" / CLIPS_FILE).unlink()
    check(run, tmp_path / "captions")
    with pytest.raises(InputError, match=r"holds 2 captions whose words are not in its clips\.jsonl"):
        check(run, tmp_path / "captions", f"data.test={tmp_path / 'test'}")


def test_a_bank_that_was_not_compared_by_sound_is_told_of(corpus, run, bank, tmp_path, caplog):
    sound = np.random.default_rng(9).normal(scale=0.1, size=800).astype(np.float32)
    for split in ("test", "other"):
        write_shards([Clip(f"{split}-0", sound, RATE, ("other words",))], tmp_path / split, "test")
    asked = ["data.fingerprints=true", f"data.test={tmp_path / 'test'}"]
    (tmp_path / "captions.txt").write_text("noise number 1\n")
    build(run, tmp_path / "captions.txt", tmp_path / "captions", Console(quiet=True))
    check(run, bank, asked[1])
    check(run, tmp_path / "captions", *asked)  # captions have no sound
    heard = shutil.copytree(run, tmp_path / "heard")
    (heard / "config.yaml").write_text(configuration.dump(configuration.load(run / "config.yaml", asked)))
    check(heard, bank)
    assert caplog.messages == []
    check(run, bank, *asked)
    check(heard, bank, f"data.test={tmp_path / 'other'}")
    line = f"bank.from={bank} holds no sounds to compare by data.fingerprints, only keys, digests and recordings; "
    assert [message.startswith(line) and "\n" not in message for message in caplog.messages] == [True, True]


def test_the_folders_of_pretrained_encoders_are_not_needed_again(tmp_path):
    needs_pretrained()
    clap, run, vocabulary = save_clap(tmp_path / "clap"), tmp_path / "run", Vocabulary.train(CAPTIONS, 300)
    tree = {"name": "clap", "data": {"train": "x", "sample_rate": 8000}}
    towers = {"audio": {"name": "clap-htsat"}, "text": {"name": "clap-text", "max_tokens": 16}}
    model = {"embedding_dim": 12, "projection": "none"}
    placed = {name: tower | {"source": str(clap)} for name, tower in towers.items()}
    first = new_model(configuration.parse(tree | {"model": model | placed}), vocabulary)
    save_model(run / "model", first)
    shutil.rmtree(clap)
    for given in (placed, towers):
        second = new_model(configuration.parse(tree | {"model": model | given | {"from": str(run)}}), vocabulary)
        load_weights(second, run)
        assert all(value.equal(second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.audio.source=clap", r"model\.audio\.source=clap is not read by the encoder conv; leave it out, or"),
        ("model.text.source=clap", r"model\.text\.source=clap is not read by the encoder transformer; leave it out"),
        ("model.audio.options={bands: 3}", r"model\.audio\.options={'bands': 3} is not read by the encoder conv; "),
        ("model.text.pooling=cls", r"model\.text\.pooling=cls is not read by the encoder transformer; leave it out"),
    ],
)
def test_settings_that_an_encoder_does_not_read_are_refused_and_finished_runs_with_them_open(
    corpus, run, tmp_path, override, line
):
    config = configuration.load(run / "config.yaml", [override])
    with pytest.raises(InputError, match=f"^{line}") as error:
        check_start(config, load_shards(config))
    assert "\n" not in str(error.value)
    old = untrained_run(tmp_path / "old", corpus)
    (old / "config.yaml").write_text(configuration.dump(config))
    _, model = load_model(old)
    assert model.text.output_dim == 32
    check(run, None, f"model.from={old}")


def test_a_scale_above_its_cap_is_refused(run):
    line = r"^model\.logit_scale_init=120 is above model\.logit_scale_max=100; lower the one or raise the other$"
    with pytest.raises(InputError, match=line):
        check(run, None, "model.from=null", "model.logit_scale_init=120")
    check(run, None, "model.from=null", "model.logit_scale_init=100")


@register_audio_encoder("reads_all")
@register_audio_encoder("reads_options", reads=("options",))
def _bands(config: configuration.Model, sample_rate: int) -> ConvAudioEncoder:
    return ConvAudioEncoder(sample_rate, config.audio.options["bands"], 8, 0.0)


def test_an_encoder_of_another_package_reads_what_it_was_registered_to(run):
    check(run, None, "model.from=null", "model.audio={name: reads_all, source: x, options: {bands: 3}}")
    check(run, None, "model.from=null", "model.audio={name: reads_options, options: {bands: 3}}")
    with pytest.raises(InputError, match=r"^model\.audio\.source=x is not read by the encoder reads_options"):
        check(run, None, "model.from=null", "model.audio={name: reads_options, source: x, options: {bands: 3}}")


def test_rows_of_other_weights_are_refused(corpus, run, bank, tmp_path):
    other = untrained_run(tmp_path / "other", corpus, seed=1)
    assert digest(other) != digest(run)
    with pytest.raises(InputError, match=r"was not encoded by the weights of model\.from") as error:
        check(other, bank)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"bank\.from=.* set model\.from=RUN"):
        configuration.load(run / "config.yaml", [f"bank.from={bank}"])
    with pytest.raises(InputError, match=r"knowledge\.enabled is false"):
        check(run, bank, "knowledge.enabled=false")
    with pytest.raises(InputError, match="holds no finished run"):
        check(run, bank, f"model.from={tmp_path}")
    with pytest.raises(InputError, match="is this very run"):
        check(run, bank, f"output_dir={run.parent}")
    with pytest.raises(InputError, match="holds no readable bank"):
        check(run, tmp_path)


def test_external_rows_are_right_at_step_0_until_training_takes_them_over(run, bank):
    size = {"dim": 32, "capacity": CLIPS}
    held = KnowledgeBank.from_state(external.load(bank, digest(run), 32), **size)
    now = held.snapshot()
    assert set(now.step.tolist()) == {EXTERNAL}
    assert set(now.frame.tolist()) == {0}
    assert set(now.reliability.tolist()) == {-1.0}
    told = held.metrics()
    assert (told["bank/rows"], told["bank/external_rows"], told["bank/external_share"]) == (CLIPS, CLIPS, 0.0)
    taken = now.ids[:4]
    held.upsert(taken, now.text[:4], now.text[:4], None, step=0)
    held.search_ids(taken, k=2)
    told = held.metrics()
    assert told["bank/external_rows"] == CLIPS - 4
    assert told["bank/external_share"] == 1.0
    np.testing.assert_array_equal(held.snapshot().audio[:4], now.text[:4])


def test_the_weights_of_one_run_are_those_another_starts_with(corpus, run, tmp_path):
    _, model = load_model(untrained_run(tmp_path / "other", corpus, seed=1))
    _, wanted = load_model(run)
    load_weights(model, run)
    for (name, value), expected in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert value.equal(expected), name


def test_a_run_may_start_from_one_of_the_other_loss(corpus, run, tmp_path):
    sigmoid = untrained_run(tmp_path / "sigmoid", corpus, seed=1, loss="siglip")
    vocabulary = Vocabulary.load(run / "model" / Vocabulary.FILE)
    for source, loss, bias in ((run, "siglip", -10.0), (sigmoid, "info_nce", None)):
        config = configuration.load(run / "config.yaml", [f"model.from={source}", f"optimization.loss={loss}"])
        check_start(config, load_shards(config))
        model = new_model(config, vocabulary)
        load_weights(model, source)
        assert model.audio_projection[0].weight.equal(load_model(source)[1].audio_projection[0].weight)
        assert bias == (None if model.logit_bias is None else model.logit_bias.item())


def test_the_learned_bias_is_part_of_the_weights(corpus, tmp_path):
    folder = untrained_run(tmp_path / "sigmoid", corpus, loss="siglip")
    _, model = load_model(folder)
    torch.nn.init.constant_(model.logit_bias, -7.0)
    save_model(folder / "model", model)
    assert load_model(folder)[1].logit_bias.item() == -7.0
