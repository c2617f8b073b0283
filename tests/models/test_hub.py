"""Encoders by their ids on a hub: a server of this machine that speaks its protocol, asked by its own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.conftest import needs_pretrained
from tests.models.hub import serving
from tests.models.towers import save_cnn14, save_roberta

# The client reads its addresses from the environment when it is imported, so each case is a process.
BUILD = """
import json, sys
import torch
from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.audio import build_audio_encoder
from ask_dist.models.text import Vocabulary, build_text_encoder
tower, settings = sys.argv[1], json.loads(sys.argv[2])
try:
    model = Model.model_validate({tower: settings})
    if tower == "audio":
        encoder = build_audio_encoder(model, 32_000).eval()
        value = encoder(torch.linspace(-1, 1, 16_000)[None])
    else:
        encoder = build_text_encoder(model, Vocabulary.train(["rain on a roof"], size=300)).eval()
        value = encoder(encoder.tokenize(["rain on a roof"]))
    print(json.dumps(value[0, :8].tolist()))
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    needs_pretrained()
    folder = tmp_path_factory.mktemp("hub")
    save_roberta(folder / "sounds" / "tiny-roberta")
    (folder / "sounds" / "tiny-roberta" / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "sounds" / "tiny-roberta" / "modeling_own.py").write_text("raise SystemExit('run')")
    (folder / "sounds" / "panns").mkdir()
    save_cnn14(folder / "sounds" / "panns" / "Cnn14_mAP=0.431.pth")
    return folder


def build(tower: str, settings: dict, home: Path, hub: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settled = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    command = [sys.executable, "-c", BUILD, tower, json.dumps(settings)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settled, timeout=240)


def values(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def text(source: str | Path) -> dict:
    return {"name": "automodel", "source": str(source), "max_tokens": 16}


def cnn14(source: str | Path) -> dict:
    return {"name": "cnn14", "source": str(source)}


def test_an_id_gives_the_encoder_of_the_folder_and_fetches_nothing_that_could_run(repositories, tmp_path):
    with serving(repositories) as hub:
        fetched = values(build("text", text("sounds/tiny-roberta"), tmp_path, hub.url))
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.fetched)
        assert not {"pytorch_model.bin", "modeling_own.py"} & set(hub.fetched)
    assert fetched == values(build("text", text(repositories / "sounds" / "tiny-roberta"), tmp_path, hub.url))
    assert fetched == values(build("text", text("sounds/tiny-roberta"), tmp_path, hub.url))  # the hub is away now


def test_a_file_of_a_repository_is_fetched_alone(repositories, tmp_path):
    file = "sounds/panns/Cnn14_mAP=0.431.pth"
    with serving(repositories) as hub:
        fetched = values(build("audio", cnn14(file), tmp_path, hub.url))
        assert hub.fetched == ["Cnn14_mAP=0.431.pth"]
    assert fetched == values(build("audio", cnn14(repositories / file), tmp_path, hub.url))


def test_a_private_repository_is_had_by_a_token_of_the_environment(repositories, tmp_path):
    with serving(repositories, token="hf_secret") as hub:
        refused = build("text", text("sounds/tiny-roberta"), tmp_path, hub.url)
        assert refused.returncode == 2
        assert refused.stderr.startswith("model.text.source=sounds/tiny-roberta is no path here, and no hub gave it: ")
        assert len(refused.stderr.splitlines()) == 1
        assert values(build("text", text("sounds/tiny-roberta"), tmp_path, hub.url, HF_TOKEN="hf_secret"))


@pytest.mark.parametrize(
    ("tower", "settings"),
    [
        ("text", text("sounds/nothing")),
        ("audio", cnn14("sounds/panns/nothing.pth")),
        ("audio", cnn14("sounds/panns/../../etc/passwd")),
    ],
)
def test_what_a_hub_lacks_is_one_line(repositories, tmp_path, tower, settings):
    with serving(repositories) as hub:
        refused = build(tower, settings, tmp_path, hub.url)
    assert refused.returncode == 2
    assert f"model.{tower}.source={settings['source']} is no path here, and no hub gave it: " in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_repository_is_no_file_of_cnn14(repositories, tmp_path):
    with serving(repositories) as hub:
        refused = build("audio", cnn14("sounds/panns"), tmp_path, hub.url)
    assert refused.returncode == 2
    assert "the hub has no safetensors there; a single file is OWNER/NAME/FILE" in refused.stderr
