"""Power spectra of frames, on the device of the sound; written so that they can be exported to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn


def power_spectrum(
    audio: Tensor, window: Tensor, hop: int, fft: int, prepare: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Squared magnitudes of a windowed sound.

    Args:
        audio: float32 [batch, samples].
        window: float32 [length], at most `fft` long; a frame is as long.
        hop: samples from one frame to the next; the first begins with the first sample.
        fft: length of the transform; frames are filled up with zeros at their end.
        prepare: a linear map of frames [..., length] before they are windowed.

    Returns:
        float32 [batch, fft // 2 + 1, frames].
    """
    if torch.onnx.is_in_onnx_export():  # knows no complex numbers: the transform as a convolution with its basis
        basis = torch.eye(len(window))
        rows = (basis if prepare is None else prepare(basis)) * window.float().cpu()
        transform = np.fft.rfft(rows.detach().numpy().astype(np.float64), fft)
        kernels = torch.from_numpy(np.concatenate([transform.real.T, transform.imag.T])[:, None].astype(np.float32))
        real, imaginary = nn.functional.conv1d(audio.unsqueeze(1), kernels, stride=hop).chunk(2, dim=1)
        return real.square() + imaginary.square()
    frames = audio.unfold(1, len(window), hop)
    spectrum = torch.fft.rfft((frames if prepare is None else prepare(frames)) * window, fft)
    return (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class MelSpectrum:
    """Mel bands of the power spectrum. No module: a model that is cast to bf16 would round its arrays.

    Attributes:
        window: float32 [length], on the CPU.
        hop: samples from one frame to the next.
        fft: length of the transform.
        filters: float32 [fft // 2 + 1, bands], on the CPU.
        centred: the first frame has its middle at the first sample, where the sound is reflected.
        prepare: of `power_spectrum`.
    """

    window: Tensor
    hop: int
    fft: int
    filters: Tensor
    centred: bool = True
    prepare: Callable[[Tensor], Tensor] | None = None

    def __call__(self, audio: Tensor) -> Tensor:
        """float32 [batch, samples] -> float32 [batch, frames, bands]; autocast is left out, for quiet sounds."""
        with torch.autocast(audio.device.type, enabled=False):
            audio = audio.float()
            if self.centred:
                half = len(self.window) // 2
                audio = nn.functional.pad(audio.unsqueeze(1), (half, half), mode="reflect").squeeze(1)
            window, filters = _on(self, audio.device)
            return power_spectrum(audio, window, self.hop, self.fft, self.prepare).transpose(1, 2) @ filters


@lru_cache(maxsize=8)
def _on(spectrum: MelSpectrum, device: torch.device) -> tuple[Tensor, Tensor]:
    return spectrum.window.to(device), spectrum.filters.to(device)
