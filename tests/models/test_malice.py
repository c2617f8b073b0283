"""Folders of pretrained towers made by a stranger: no file of theirs runs, in whatever form it comes."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest

from ask_dist.errors import InputError
from ask_dist.models.dual_encoder import build_dual_encoder
from tests.models.conftest import needs_pretrained
from tests.models.test_clap import RATE, both
from tests.models.test_saved import Malice
from tests.models.towers import save_clap

REPLACED = ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def folder(tmp_path) -> Path:
    needs_pretrained()
    return save_clap(tmp_path / "clap")


@pytest.mark.parametrize("name", REPLACED)
def test_a_pickle_in_place_of_a_file_is_refused_and_never_runs(folder, tmp_path, vocabulary, name):
    (folder / name).write_bytes(pickle.dumps(Malice(tmp_path / "the-pickle-ran")))
    with pytest.raises(InputError) as error:
        build_dual_encoder(both(folder), RATE, vocabulary)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "the-pickle-ran").exists()


def test_weights_in_a_pickle_beside_nothing_better_are_refused(folder, tmp_path, vocabulary):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(tmp_path / "the-pickle-ran")))
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        build_dual_encoder(both(folder), RATE, vocabulary)
    assert not (tmp_path / "the-pickle-ran").exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_that_a_folder_brings_along_never_runs(folder, tmp_path, vocabulary, name):
    marker = tmp_path / "the-code-ran"
    (folder / "stranger.py").write_text(f"open({str(marker)!r}, 'w')\nclass Stranger: pass\n")
    tree = json.loads((folder / name).read_text())
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoFeatureExtractor", "AutoProcessor")
    tree["auto_map"] = {kind: ["stranger.Stranger"] * 2 if "Token" in kind else "stranger.Stranger" for kind in kinds}
    (folder / name).write_text(json.dumps(tree))
    with suppress(InputError):
        build_dual_encoder(both(folder), RATE, vocabulary)
    assert not marker.exists()
