"""Both towers as ONNX graphs: waveforms or tokens in, unit vectors out; each checked against the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.files import write_atomically
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.pretrained import first_line, optional_module
from ask_dist.models.text import Vocabulary

OPSET = 17
TOLERANCE = 1e-3  # of a cosine


def write_graphs(folder: Path, model: DualEncoder, config: Config) -> None:
    """Writes audio.onnx, text.onnx and the text encoder's files.

    audio.onnx takes float32 [batch, samples] of the run's clip length, text.onnx int64 [batch, model.text.max_tokens]
    of the tokenizer and its padding; each gives float32 [batch, embedding_dim] at unit length.

    Raises:
        InputError: `onnx` is not installed, clips have lengths of their own, or a tower can't be written as a graph
            that gives what it gives.
    """
    if config.data.length_step is not None:
        raise InputError(
            f"a model of data.length_step={config.data.length_step:g} hears clips of several lengths, and an ONNX "
            "graph takes one; use --format safetensors"
        )
    samples = round(config.data.clip_seconds * config.data.sample_rate)
    audio = 0.1 * torch.randn(3, samples, generator=torch.Generator().manual_seed(0))
    tokens = model.text.tokenize(["a dog barks twice", "rain falls", "a"])
    tokens = nn.functional.pad(tokens, (0, config.model.text.max_tokens - tokens.shape[1]))
    _write(folder / "audio.onnx", _Hearing(model).eval(), config.model.audio.name, audio)
    _write(folder / "text.onnx", _Reading(model).eval(), config.model.text.name, model.text.exchange_padding(tokens))
    for name, content in model.text.assets().items():
        if Path(name).name == Vocabulary.FILE:
            write_atomically(folder / Vocabulary.FILE, content)


class _Hearing(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio: Tensor) -> Tensor:
        return self.model.encode_audio(audio)


class _Reading(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(self.model.text.exchange_padding(tokens))


def _write(path: Path, tower: nn.Module, name: str, inputs: Tensor) -> None:
    """A tower's graph, traced with all of `inputs` and checked with all but the last."""
    evaluator = optional_module("onnx.reference", "onnx").ReferenceEvaluator
    try:
        with torch.no_grad(), _for_tracing():
            torch.onnx.export(
                tower,
                (inputs,),
                str(path),
                dynamo=False,  # the other exporter needs onnxscript
                opset_version=OPSET,
                input_names=["inputs"],
                output_names=["features"],
                dynamic_axes={"inputs": {0: "batch"}, "features": {0: "batch"}},
            )
            found = evaluator(str(path)).run(None, {"inputs": inputs[:-1].numpy()})[0]
            wanted = tower(inputs[:-1]).numpy()
    except (InputError, OSError):
        raise
    except Exception as error:  # of the exporter and of the evaluator, of any kind
        raise InputError(f"{name} can't be written as ONNX: {first_line(error)}; use --format safetensors") from None
    difference = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    if not difference < TOLERANCE:
        raise InputError(
            f"{name} as ONNX gives other features, by {difference:.2g} where {TOLERANCE} is allowed; "
            "use --format safetensors"
        )


@contextmanager
def _for_tracing() -> Iterator[None]:
    """Without torch's fused attention, which has no ONNX operator, and without its notes on tracing."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
