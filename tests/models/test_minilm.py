"""Text encoders out of transformers folders: equal to transformers' own, whatever their padding; nothing runs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ask_dist.errors import InputError
from ask_dist.models.minilm import FolderTextEncoder, minilm_folder
from ask_dist.models.text import Vocabulary
from tests.models.conftest import CAPTIONS, needs_pretrained
from tests.models.test_saved import Malice
from tests.models.towers import save_tokenizer


def reference(folder: Path, captions: list[str]) -> Tensor:
    """Each caption alone, without padding: the mean of the last states."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        encoded = [tokenizer(caption, return_tensors="pt") for caption in captions]
        return torch.cat([network(**tokens).last_hidden_state.mean(dim=1) for tokens in encoded])


@pytest.fixture
def padded_by_one(tmp_path) -> Path:
    """A tiny RoBERTa whose padding is 1 and whose 0 is a token, as in the real ones."""
    needs_pretrained()
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    words = sorted({word for caption in CAPTIONS for word in caption.lower().replace(",", "").split()})
    units = {unit: place for place, unit in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(units, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(RobertaConfig(vocab_size=len(units), max_position_embeddings=34, **size)).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    return tmp_path


def test_minilm_gives_what_transformers_gives(minilm):
    wanted = reference(minilm_folder(), CAPTIONS)
    ours = minilm(minilm.tokenize(CAPTIONS))
    assert ours.shape == (len(CAPTIONS), minilm.output_dim) == (len(CAPTIONS), 384)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_minilm_knows_what_words_mean(minilm):
    dog, puppy, rain = minilm(minilm.tokenize(["a dog barks", "the bark of a puppy", "rain falls on a roof"]))
    near, far = (torch.nn.functional.cosine_similarity(dog, other, dim=0) for other in (puppy, rain))
    assert near > far + 0.2


def test_rows_are_padded_with_0_and_cut(minilm):
    tokens = minilm.tokenize(["a drum", "rain " * 100, ""])
    assert tokens.dtype == torch.int64
    assert (tokens != 0).sum(dim=1).tolist() == [4, 32, 2]
    assert tokens.shape == (3, 32)
    assert minilm.tokenize([]).shape == (0, 1)
    assert torch.isfinite(minilm(tokens)).all()


def test_the_saved_tokenizer_gives_the_same_tokens(minilm, tmp_path):
    minilm.tokenize(["a call that sets padding and truncation"])
    (tmp_path / Vocabulary.FILE).write_bytes(minilm.assets()[Vocabulary.FILE])
    loaded = Vocabulary.load(tmp_path / Vocabulary.FILE).tokenizer
    for caption in CAPTIONS:
        assert loaded.encode(caption).ids == minilm.tokenize([caption])[0].tolist()


def test_a_decoding_process_needs_neither_weights_nor_transformers(minilm, tmp_path):
    (tmp_path / "tokenize").write_bytes(content := pickle.dumps(minilm.portable_tokenize()))
    assert len(content) < 4e6  # of 90 MB of weights
    code = (
        "import pickle, sys\n"
        "tokens = pickle.load(open(sys.argv[1], 'rb'))(sys.argv[2:])\n"
        "print(tokens.tolist(), 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tokenize"), *CAPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{minilm.tokenize(CAPTIONS).tolist()} False"


def test_another_folder_with_another_padding_works_the_same(padded_by_one):
    encoder = FolderTextEncoder(padded_by_one, max_tokens=32)
    captions = [caption.lower().replace(",", "") for caption in CAPTIONS]
    tokens = encoder.tokenize(captions)
    lengths = [len(caption.split()) + 2 for caption in captions]
    assert (tokens != 0).sum(dim=1).tolist() == lengths
    torch.testing.assert_close(encoder(tokens), reference(padded_by_one, captions), atol=1e-5, rtol=0)


def test_more_tokens_than_the_network_has_places_for_are_refused():
    needs_pretrained()
    with pytest.raises(InputError, match=r"model\.text\.max_tokens=1000 is more than .* use 512"):
        FolderTextEncoder(minilm_folder(), max_tokens=1000)


def test_weights_in_a_pickle_are_refused_and_never_run(padded_by_one, tmp_path):
    marker = tmp_path / "the-pickle-ran"
    (padded_by_one / "model.safetensors").unlink()
    (padded_by_one / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises(InputError, match="is no AutoModel for transformers") as error:
        FolderTextEncoder(padded_by_one, max_tokens=32)
    assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_without_a_needed_file_is_refused(padded_by_one, name):
    (padded_by_one / name).unlink()
    with pytest.raises(InputError, match=rf"holds no {name}: give a folder"):
        FolderTextEncoder(padded_by_one, max_tokens=32)


def test_a_folder_of_something_else_is_refused_in_one_line(padded_by_one):
    (padded_by_one / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is no AutoModel for transformers") as error:
        FolderTextEncoder(padded_by_one, max_tokens=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["T5", "CLIP"])
def test_networks_that_do_more_than_read_captions_are_refused(tmp_path, kind):
    needs_pretrained()
    import transformers

    size = save_tokenizer(tmp_path)
    t5 = {"vocab_size": size, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = {"text_config": side | {"vocab_size": size}, "vision_config": side | {"image_size": 8, "patch_size": 4}}
    config = transformers.T5Config(**t5) if kind == "T5" else transformers.CLIPConfig(**clip, projection_dim=8)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"holds {kind.lower()}, which is no text encoder of BERT's kind"):
        FolderTextEncoder(tmp_path, max_tokens=8)
