"""A finished run for other programs: it loads there and gives the same embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from ask_dist import config as configuration
from ask_dist.errors import InputError
from ask_dist.export.card import published
from ask_dist.export.command import export
from ask_dist.models.dual_encoder import build_dual_encoder
from ask_dist.models.saved import load_model, save_model
from ask_dist.models.text import Vocabulary
from tests.models.conftest import needs_pretrained
from tests.models.towers import save_ast, save_clap, save_cnn14, save_roberta, save_whisper

onnx_reference = pytest.importorskip("onnx.reference", reason="needs the extra ask-dist[pretrained]")
CAPTIONS = ["a dog barks", "rain falls on a tin roof and then three loud notes", "viola"]
SMALL = {"embedding_dim": 12, "text": {"width": 16, "heads": 2, "max_tokens": 16}}


def finished(folder: Path, rate: int, model: dict, **data: Any) -> Path:
    """What a finished run leaves of its model, without the training."""
    data = {"train": "/secret/tones/train", "sample_rate": rate, "clip_seconds": 1.0, **data}
    tree = {"name": "tones", "data": data}
    config = configuration.parse(tree | {"model": model})
    torch.manual_seed(1)
    built = build_dual_encoder(config.model, rate, Vocabulary.train(CAPTIONS, 300))
    save_model(folder / "model", built)
    (folder / "config.yaml").write_text(configuration.dump(config))
    recall = {"R@1": 12.3, "R@5": 45.6, "R@10": 78.9, "mAP@10": 33.3, "median_rank": 6.0}
    report = {"text_to_audio": recall, "audio_to_text": recall, "dataset": "test"}
    report |= {"intervals": {"text_to_audio": {"R@1": [10.1, 14.5]}}, "throughput": {"samples_seen": 640}}
    report["throughput"]["global_steps"] = 20
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def clap_run(tmp_path: Path) -> Path:
    needs_pretrained()
    source = str(save_clap(tmp_path / "clap"))
    audio, text = {"name": "clap-htsat", "source": source}, {"name": "clap-text", "source": source, "max_tokens": 16}
    run = finished(tmp_path / "run", 8000, {"embedding_dim": 12, "projection": "none", "audio": audio, "text": text})
    (tmp_path / "clap").rename(tmp_path / "moved")  # a finished run needs its sources no more
    return run


def sounds(rate: int, clips: int = 3) -> Tensor:
    time = torch.arange(rate) / rate
    return 0.3 * (2 * torch.pi * 200 * 2 ** torch.arange(clips)[:, None] * time).sin()


@torch.no_grad()
def features(run: Path, rate: int) -> tuple[Tensor, Tensor]:
    _, model = load_model(run)
    return model.encode_audio(sounds(rate)), model.encode_text(model.text.tokenize(CAPTIONS))


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def test_transformers_gives_the_same_embeddings(tmp_path, console):
    from transformers import ClapModel, ClapProcessor

    run, folder = clap_run(tmp_path), tmp_path / "out"
    export(run, "transformers", folder, console)
    theirs, processor = ClapModel.from_pretrained(folder).eval(), ClapProcessor.from_pretrained(folder)
    heard = processor.feature_extractor(list(sounds(8000).numpy()), sampling_rate=8000, return_tensors="pt")
    read = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        given = theirs(read["input_ids"], heard["input_features"].float(), attention_mask=read["attention_mask"])
    audio, text = features(run, 8000)
    torch.testing.assert_close(given.audio_embeds, audio, atol=1e-5, rtol=0)
    torch.testing.assert_close(given.text_embeds, text, atol=1e-5, rtol=0)
    assert float(theirs.logit_scale_a.exp()) == pytest.approx(
        1 / 0.07, abs=1e-3
    )  # that of the folder which both towers began with
    card = (folder / "README.md").read_text()
    assert "ClapModel.from_pretrained" in card
    assert "12.3 (10.1 to 14.5)" in card
    assert "640 pairs" in card
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert "secret" not in card
    assert str(folder / "model.safetensors") in console.export_text()


def test_safetensors_is_a_run_that_loads_anywhere(tmp_path, console):
    run = finished(tmp_path / "run", 8000, SMALL | {"audio": {"width": 8, "mel_bins": 20}})
    export(run, "safetensors", tmp_path / "out", console)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "config.yaml", "model"]
    for ours, wanted in zip(features(tmp_path / "out", 8000), features(run, 8000), strict=True):
        assert torch.equal(ours, wanted)
    assert "secret" not in (tmp_path / "out" / "config.yaml").read_text()


def test_no_place_of_this_machine_is_published():
    data = {"train": ["/secret/a/train", "s3://secret/b/train"], "cache_dir": "/secret/cache"}
    data |= {split: f"/secret/b/{split}" for split in ("validation", "test", "held_out")}
    tree = {
        "name": "tones",
        "data": data,
        "output_dir": "/secret/runs",
        "model": {"from": "/secret/run", "audio": {"source": "/secret/a/clap"}, "text": {"source": "/secret/a/clap"}},
        "bank": {"from": "/secret/bank"},
        "refine": {"strategy": "reencode", "corpus": "/secret/corpus/train"},
        "tracking": {"tensorboard": True, "wandb": "secret", "mlflow": "sqlite:////secret/runs.db"},
    }
    shown = published(configuration.parse(tree))
    assert shown.data.train == (Path("a/train"), Path("b/train"))
    assert "secret" not in configuration.dump(shown)


def test_a_run_of_several_folders_is_exported_with_all_of_them_in_its_card(tmp_path, console):
    run = finished(tmp_path / "run", 8000, SMALL | {"audio": {"width": 8, "mel_bins": 20}})
    folders = ["data.train=[/secret/tones/train, /secret/noise/train]"]
    several = configuration.load(run / "config.yaml", folders)
    (run / "config.yaml").write_text(configuration.dump(several))
    export(run, "safetensors", tmp_path / "out", console)
    assert "| train | tones/train, noise/train |" in (tmp_path / "out" / "README.md").read_text()


def towers(kind: str, tmp_path: Path) -> tuple[int, dict]:
    if kind == "conv":
        return 8000, SMALL | {"audio": {"width": 8, "mel_bins": 20}}
    needs_pretrained()
    if kind == "yamnet":
        return 16_000, SMALL | {"audio": {"name": "yamnet"}}
    if kind == "cnn14":
        return 32_000, SMALL | {"audio": {"name": kind, "source": str(save_cnn14(tmp_path / "cnn14.pth"))}}
    save = {"ast": save_ast, "whisper": save_whisper}[kind]
    return 16_000, SMALL | {"audio": {"name": kind, "source": str(save(tmp_path / kind))}}


def check_graphs(run: Path, folder: Path, rate: int) -> None:
    _, model = load_model(run)
    audio, text = features(run, rate)
    heard = onnx_reference.ReferenceEvaluator(str(folder / "audio.onnx")).run(None, {"inputs": sounds(rate).numpy()})[0]
    tokens = model.text.tokenize(CAPTIONS)
    tokens = model.text.exchange_padding(torch.nn.functional.pad(tokens, (0, 16 - tokens.shape[1])))
    read = onnx_reference.ReferenceEvaluator(str(folder / "text.onnx")).run(None, {"inputs": tokens.numpy()})[0]
    assert float((audio[0] - audio[-1]).abs().max()) > 1e-3  # else anything would be within the tolerance
    np.testing.assert_allclose(heard, audio, atol=1e-4)
    np.testing.assert_allclose(read, text, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "ast", "whisper", "yamnet", pytest.param("cnn14", marks=pytest.mark.slow)])
def test_onnx_gives_the_same_embeddings(kind, tmp_path, console):
    rate, model = towers(kind, tmp_path)
    run = finished(tmp_path / "run", rate, model)
    export(run, "onnx", tmp_path / "out", console)
    check_graphs(run, tmp_path / "out", rate)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "audio.onnx", "text.onnx", "tokenizer.json"]


def test_clap_gives_the_same_embeddings_in_onnx(tmp_path, console):
    run = clap_run(tmp_path)
    export(run, "onnx", tmp_path / "out", console)
    check_graphs(run, tmp_path / "out", 8000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=16)
    tokens = np.array([encoding.ids for encoding in tokenizer.encode_batch(CAPTIONS)])
    read = onnx_reference.ReferenceEvaluator(str(tmp_path / "out" / "text.onnx")).run(None, {"inputs": tokens})[0]
    np.testing.assert_allclose(read, features(run, 8000)[1], atol=1e-4)


def test_what_transformers_has_no_class_for_is_refused_and_leaves_nothing(tmp_path, console):
    run = finished(tmp_path / "run", 8000, SMALL | {"audio": {"width": 8, "mel_bins": 20}})
    with pytest.raises(InputError, match=r"no class for conv with transformer .* use --format safetensors") as error:
        export(run, "transformers", tmp_path / "out", console)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_one_length_is_not_enough_for_a_run_of_several(tmp_path, console):
    run = finished(tmp_path / "run", 8000, SMALL | {"audio": {"width": 8, "mel_bins": 20}}, length_step=0.5)
    with pytest.raises(InputError, match=r"data.length_step=0.5 hears clips of several lengths.* use --format safe"):
        export(run, "onnx", tmp_path / "out", console)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_in_use_is_left_alone(tmp_path, console):
    run = finished(tmp_path / "run", 8000, SMALL | {"audio": {"width": 8, "mel_bins": 20}})
    with pytest.raises(InputError, match="holds something already"):
        export(run, "safetensors", run, console)


def test_the_working_folder_is_not_replaced(tmp_path, console, monkeypatch):
    run = finished(tmp_path / "run", 8000, SMALL | {"audio": {"width": 8, "mel_bins": 20}})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (Path("."), Path.cwd()):
        with pytest.raises(InputError, match=r"is the folder that the command runs in.*; name one in it, .*model$"):
            export(run, "safetensors", folder, console)
    export(run, "safetensors", Path("model"), console)
    assert (tmp_path / "here" / "model" / "config.yaml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "run"]


def test_an_automodel_tower_needs_its_folder_no_more(tmp_path, console):
    needs_pretrained()
    folder = save_roberta(tmp_path / "roberta")
    text = {"name": "automodel", "source": str(folder), "pooling": "cls", "max_tokens": 16}
    model = {"embedding_dim": 12, "audio": {"width": 8, "mel_bins": 20}, "text": text}
    run = finished(tmp_path / "run", 8000, model)
    before = features(run, 8000)
    folder.rename(tmp_path / "moved")
    for ours, wanted in zip(features(run, 8000), before, strict=True):
        assert torch.equal(ours, wanted)
    export(run, "onnx", tmp_path / "out", console)
    check_graphs(run, tmp_path / "out", 8000)
