"""Zero-shot classification: the metrics against hand counts, and a model that learned to tell three tones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ask_dist import config as configuration
from ask_dist.cli import main
from ask_dist.config import Config
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip
from ask_dist.errors import InputError
from ask_dist.evaluate.zero_shot import average_precision, check_templates, classify, labels, read_classes, zero_shot
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.saved import save_model
from ask_dist.models.text import Vocabulary

RATE = 8000
PITCHES = {"low_tone": 200.0, "Middle tone": 800.0, "high tone": 3000.0}
WORDS = ["low tone", "middle tone", "high tone"]


def tone(name: str, number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    time = np.arange(RATE // 2) / RATE
    wave = rng.uniform(0.1, 0.5) * np.sin(2 * np.pi * PITCHES[name] * rng.uniform(0.9, 1.1) * time)
    return (wave + rng.normal(scale=0.01, size=len(time))).astype(np.float32)


def shards(folder: Path, several: bool = False) -> Path:
    names = list(PITCHES)
    clips = [
        Clip(f"clip-{n:02d}", tone(names[n % 3], 100 + n), RATE, ("a sound",), (names[n % 3], "other")[: 1 + several])
        for n in range(12)
    ]
    write_shards(clips, folder, "test", clips_per_shard=6)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model that learned the three tones in a minute's worth of sound."""
    folder = tmp_path_factory.mktemp("runs") / "tones"
    tree = {
        "name": "tones",
        "data": {"train": "nowhere", "clip_seconds": 0.5, "sample_rate": RATE},
        "model": {"embedding_dim": 16, "audio": {"width": 8, "mel_bins": 20}, "text": {"width": 16, "heads": 2}},
    }
    config: Config = configuration.parse(tree)
    torch.manual_seed(0)
    sentences = [f"{start} {word}" for start in ("the sound of", "I hear") for word in WORDS]
    model = build_dual_encoder(config.model, RATE, Vocabulary.train(sentences, 300))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        audio = torch.from_numpy(np.stack([tone(name, step) for name in PITCHES]))
        features = model(audio, model.text.tokenize(sentences[3 * (step % 2) :][:3]))
        logits = features.logit_scale * features.audio_features @ features.text_features.T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(folder / "model", model)
    (folder / "config.yaml").write_text(configuration.dump(config))
    return folder


@pytest.fixture
def classes(tmp_path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("Low tone\n\nmiddle_tone\nhigh tone\n")
    return path


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def test_average_precision_by_hand():
    scores, truth = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    assert average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.zeros(4), truth) == pytest.approx((1 / 3 + 2 / 4) / 2)  # a tie is lost


def test_one_class_a_clip_gives_accuracies_and_several_do_not():
    scores = np.eye(6)[[0, 1, 2, 0]] + 0.1 * np.arange(6)
    single = np.eye(6, dtype=bool)[[0, 1, 2, 3]]
    found = classify(scores, single, seed=0)
    assert found["top1"] == 75.0
    assert found["top5"] == 100.0
    assert found["interval"][0] < 75.0 < found["interval"][1]
    several = single.copy()
    several[0, 5] = True
    assert "top1" not in classify(scores, several, seed=0)


def test_a_model_that_gives_all_classes_alike_scores_nothing():
    found = classify(np.ones((4, 6)), np.eye(6, dtype=bool)[:4], seed=0)
    assert found["top1"] == found["top5"] == 0.0


def test_names_are_compared_without_capitals_and_underscores():
    assert labels([["Dog_bark"], ["rain", "dog  bark"], []], ["rain", "dog bark"]).tolist() == [
        [False, True],
        [True, True],
        [False, False],
    ]


@pytest.mark.parametrize("templates", [["the sound of {}"], ["the sound of {}", "I hear {}"]])
def test_a_trained_model_names_the_tones(run, classes, tmp_path, console, templates):
    output = tmp_path / "scores.json"
    found = zero_shot(run, classes, shards(tmp_path / "test"), templates, output, console)
    assert found["top1"] > 90
    assert found["mAP"] > 90
    assert found["clips"] == 12
    assert json.loads(output.read_text())["templates"] == templates
    assert "top-1" in console.export_text()


def test_clips_of_several_classes_get_map_alone(run, tmp_path, console):
    (tmp_path / "classes.txt").write_text("low tone\nmiddle tone\nhigh tone\nother\n")
    found = zero_shot(run, tmp_path / "classes.txt", shards(tmp_path / "t", True), ["the sound of {}"], None, console)
    assert "top1" not in found
    assert found["mAP"] > 75  # "other" is on all of them


def test_the_command_says_what_it_lacks(run, classes, tmp_path, capsys):
    data = str(shards(tmp_path / "test"))
    arguments = ["evaluate", str(run), "--zero-shot", str(classes)]
    refusals = [
        (arguments, "needs --shards"),
        (["evaluate", str(run), "--template", "a {}"], "needs --zero-shot"),
        ([*arguments, "--shards", data, "--template", "a sound"], "needs one {}"),
    ]
    for words, line in refusals:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert line in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--shards", data])
    assert stop.value.code == 0
    assert "zero-shot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "line"), [("", "names 0 classes"), ("rain\n", "names 1 classes"), ("dog\ncat\nDOG\n", "names 'dog' twice")]
)
def test_files_that_name_no_classes_are_refused(tmp_path, text, line):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=line):
        read_classes(tmp_path / "classes.txt")


def test_classes_that_no_clip_has_are_refused(run, tmp_path, console):
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(InputError, match=r"no clip of .* has a class"):
        zero_shot(run, tmp_path / "classes.txt", shards(tmp_path / "test"), ["{}"], None, console)


@pytest.mark.parametrize("template", ["a sound", "{} and {}", "{0}", "{}}"])
def test_templates_have_one_place_for_the_class(template):
    with pytest.raises(InputError, match=r"needs one \{\}"):
        check_templates([template])
