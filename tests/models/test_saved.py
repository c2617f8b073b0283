"""A trained model on disk: it comes back whole, and nothing that is read can run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ask_dist import config as configuration
from ask_dist.errors import InputError
from ask_dist.models.saved import WEIGHTS, load_model, save_model


@pytest.fixture
def run_dir(tmp_path, model, settings) -> Path:
    tree = {"name": "run", "data": {"train": "x", "sample_rate": 8000}, "model": settings.model_dump()}
    (tmp_path / "config.yaml").write_text(configuration.dump(configuration.parse(tree)))
    save_model(tmp_path / "model", model)
    return tmp_path


def test_a_saved_model_comes_back_whole_and_in_evaluation_mode(run_dir, model):
    config, loaded = load_model(run_dir)
    assert config.data.sample_rate == 8000
    assert not loaded.training
    assert sorted(path.name for path in (run_dir / "model").iterdir()) == [WEIGHTS, "tokenizer.json"]
    audio, captions = torch.randn(2, 4000), ["a drum", "three loud notes"]
    before, after = (m(audio, m.text.tokenize(captions)) for m in (model, loaded))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_a_folder_without_weights_is_no_finished_run(run_dir):
    (run_dir / "model" / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"no finished run .* --resume"):
        load_model(run_dir)


def test_weights_of_another_model_are_refused_in_one_line(run_dir):
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("embedding_dim: 12", "embedding_dim: 16"))
    with pytest.raises(InputError, match=r"does not fit config\.yaml") as error:
        load_model(run_dir)
    assert "\n" not in str(error.value)


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", [f"model/{WEIGHTS}", "model/tokenizer.json", "config.yaml"])
def test_a_pickle_in_any_place_is_refused_and_never_runs(run_dir, name):
    marker = run_dir / "the-pickle-ran"
    payload = pickle.dumps(Malice(marker))
    (run_dir / name).write_bytes(payload)
    with pytest.raises(InputError):
        load_model(run_dir)
    assert not marker.exists()
    pickle.loads(payload)  # the payload itself works
    assert marker.exists()
