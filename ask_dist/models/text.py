"""Text encoders: captions in, one vector a caption out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.encoder import Encoder, Registry
from ask_dist.models.positions import sinusoids

PAD, UNKNOWN, SUMMARY = "[PAD]", "[UNK]", "[CLS]"


class TextEncoder(Encoder):
    """What the trainer asks of a text encoder.

    Attributes:
        output_dim: width of the vectors that it gives.
        padding: the id of its tokenizer's own padding.

    `tokenize(captions)` gives int64 [batch, tokens], padded with 0 at the end; where that is another token's id, the
    two ids are exchanged. `forward(tokens)` gives float [batch, output_dim].
    """

    padding: int = 0

    def tokenize(self, captions: list[str]) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define tokenize(captions)")

    def portable_tokenize(self) -> Callable[[list[str]], Tensor]:
        """`tokenize` of a copy without weights and layers, which can be pickled for a decoding process."""
        alone = type(self).__new__(type(self))
        nn.Module.__init__(alone)
        vars(alone).update({name: value for name, value in vars(self).items() if name not in vars(alone)})
        return alone.tokenize

    def exchange_padding(self, tokens: Tensor) -> Tensor:
        """From the ids of the tokenizer to those of `tokenize`, and back."""
        if self.padding == 0:
            return tokens
        return torch.where(tokens == 0, self.padding, tokens.masked_fill(tokens == self.padding, 0))


_REGISTRY: Registry[Callable[[Model, Vocabulary], TextEncoder]] = Registry("model.text.name")
# Makes `factory(model_config, vocabulary) -> TextEncoder` available as `model.text.name`.
register_text_encoder = _REGISTRY.register
# text_settings_read(name): which of encoder.CHOICES the encoder reads.
text_settings_read = _REGISTRY.reads


def build_text_encoder(config: Model, vocabulary: Vocabulary) -> TextEncoder:
    """The encoder that the configuration names, frozen if it says so.

    Raises:
        InputError: nobody registered it, or its own files can't be used.
    """
    encoder = _REGISTRY.find(config.text.name)(config, vocabulary)
    return encoder.freeze(config.text.unfreeze_at) if config.text.freeze else encoder


class Vocabulary:
    """A byte-level BPE tokenizer trained on the corpus's own captions (Hugging Face `tokenizers`), or a saved one."""

    FILE = "tokenizer.json"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> Vocabulary:
        """Learns at most `size` byte-level BPE units from captions; the same captions give the same units."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[PAD, UNKNOWN, SUMMARY],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads a tokenizer.json; InputError when it is none."""
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for a missing or malformed file
            raise InputError(f"{path} is no tokenizer.json: {error}") from None

    def encode(self, captions: list[str], max_tokens: int) -> Tensor:
        """int64 [batch, longest], a summary token first, 0 as padding, cut at `max_tokens`."""
        rows = [[2, *encoding.ids[: max_tokens - 1]] for encoding in self.tokenizer.encode_batch(captions)]
        tokens = torch.zeros(len(rows), max(map(len, rows), default=1), dtype=torch.int64)
        for row, units in zip(tokens, rows, strict=True):
            row[: len(units)] = torch.tensor(units)
        return tokens


class TransformerTextEncoder(TextEncoder):
    """Small transformer over caption units, from scratch; the mean of their states is the caption's vector."""

    def __init__(
        self, vocabulary: Vocabulary, width: int, layers: int, heads: int, max_tokens: int, dropout: float
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.output_dim = width
        self.max_tokens = max_tokens
        self.embedding = nn.Embedding(vocabulary.size, width, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def tokenize(self, captions: list[str]) -> Tensor:
        return self.vocabulary.encode(captions, self.max_tokens)

    def assets(self) -> dict[str, bytes]:
        return {Vocabulary.FILE: self.vocabulary.tokenizer.to_str().encode()}

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.output_dim**0.5
        padding = tokens == 0
        states = self.layers(x + sinusoids(tokens.shape[1], self.output_dim, x), src_key_padding_mask=padding)
        present = (~padding).unsqueeze(2)
        return self.norm((states * present).sum(dim=1) / present.sum(dim=1))


@register_text_encoder("transformer", reads=())
def _transformer(config: Model, vocabulary: Vocabulary) -> TextEncoder:
    text = config.text
    return TransformerTextEncoder(vocabulary, text.width, text.layers, text.heads, text.max_tokens, config.dropout)
