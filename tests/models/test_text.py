"""Text encoders: the vocabulary, padding, order, and the registry."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from ask_dist.config import Model, TextModel
from ask_dist.errors import InputError
from ask_dist.models.text import TextEncoder, Vocabulary, build_text_encoder, register_text_encoder


def encoder(vocabulary: Vocabulary, **settings: int) -> TextEncoder:
    torch.manual_seed(0)
    text = TextModel(**({"width": 16, "layers": 2, "heads": 2, "max_tokens": 32} | settings))
    return build_text_encoder(Model(text=text), vocabulary).eval()


def test_the_same_captions_give_the_same_vocabulary(vocabulary):
    captions = ["a viola", "a drum roll", "a viola and a drum"]
    first, second = (Vocabulary.train(iter(captions), size=280).tokenizer.to_str() for _ in range(2))
    assert first == second


def test_any_text_can_be_encoded_and_comes_back(vocabulary):
    text = "zürich ♫ 7² drums"
    tokens = vocabulary.encode([text], max_tokens=64)[0]
    assert vocabulary.tokenizer.decode(tokens[1:].tolist()).strip() == "zürich ♫ 72 drums"  # by NFKC


def test_case_does_not_matter(vocabulary):
    torch.testing.assert_close(vocabulary.encode(["A VIOLA"], 8), vocabulary.encode(["a viola"], 8), atol=0, rtol=0)


def test_rows_begin_with_the_summary_are_padded_with_0_and_cut():
    vocabulary = Vocabulary.train([], size=300)  # bytes alone: a unit a letter, and one for the leading space
    tokens = vocabulary.encode(["abcdefgh", "ab", ""], max_tokens=6)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, 6)
    assert tokens[:, 0].tolist() == [2, 2, 2]
    assert (tokens != 0).sum(dim=1).tolist() == [6, 4, 1]
    assert vocabulary.encode([], max_tokens=6).shape == (0, 1)


def test_a_saved_vocabulary_is_the_same_one(vocabulary, tmp_path):
    (tmp_path / Vocabulary.FILE).write_text(vocabulary.tokenizer.to_str())
    loaded = Vocabulary.load(tmp_path / Vocabulary.FILE)
    assert loaded.size == vocabulary.size
    assert loaded.tokenizer.to_str() == vocabulary.tokenizer.to_str()


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x80\x04."])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content):
    path = tmp_path / Vocabulary.FILE
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer\.json"):
        Vocabulary.load(path)


def test_padding_does_not_change_a_captions_vector(vocabulary):
    network = encoder(vocabulary)
    short, long = "a drum", "three loud notes, then rain on a tin roof"
    alone = network(network.tokenize([short]))
    together = network(network.tokenize([short, long]))
    assert network.tokenize([short, long]).shape[1] > network.tokenize([short]).shape[1]
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_the_order_of_words_matters(vocabulary):
    network = encoder(vocabulary)
    one, other = network(network.tokenize(["a viola, then a drum", "a drum, then a viola"]))
    assert (one - other).abs().max() > 1e-3


def test_an_empty_caption_has_a_finite_vector_and_finite_gradients(vocabulary):
    network = encoder(vocabulary)
    vectors = network(network.tokenize(["", "a drum"]))
    vectors[0].sum().backward()
    assert torch.isfinite(vectors).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_an_odd_width_works(vocabulary):
    network = encoder(vocabulary, width=15, heads=3)
    assert network(network.tokenize(["a drum"])).shape == (1, 15)


def test_a_portable_tokenizer_gives_the_same_tokens_without_the_weights(vocabulary):
    network = encoder(vocabulary, width=512)
    content = pickle.dumps(network.portable_tokenize())
    assert len(content) < 2 * len(vocabulary.tokenizer.to_str().encode()) + 2000
    captions = ["a viola", "a drum roll, then a viola", ""]
    assert torch.equal(pickle.loads(content)(captions), network.tokenize(captions))


def test_an_unknown_name_lists_the_known_ones(vocabulary):
    with pytest.raises(InputError, match=r"model\.text\.name='gpt-nothing' is not registered; known: .*transformer"):
        build_text_encoder(Model(text=TextModel(name="gpt-nothing")), vocabulary)


def test_anybodys_encoder_can_be_registered(vocabulary):
    class Length(TextEncoder):
        output_dim = 1

        def tokenize(self, captions: list[str]) -> Tensor:
            return torch.tensor([[len(caption)] for caption in captions])

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.float()

    register_text_encoder("test-length")(lambda config, vocabulary: Length())
    built = build_text_encoder(Model(text=TextModel(name="test-length")), vocabulary)
    assert built(built.tokenize(["drum", ""])).tolist() == [[4.0], [0.0]]
    assert built.portable_tokenize()(["drum", ""]).tolist() == [[4], [0]]
    assert built.assets() == {}


def test_an_encoder_without_a_tokenizer_says_so():
    with pytest.raises(TypeError, match="TextEncoder does not define tokenize"):
        TextEncoder().tokenize(["a drum"])
