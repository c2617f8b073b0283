"""Decoding, resampling and cutting of mono waveforms."""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile

SILENCE = 1e-4
# torchaudio's resampler builds one filter per output phase, so its cost grows with the reduced ratio's terms.
LARGEST_RATIO_TERM = 1000


class BadSample(ValueError):
    """A clip that can't be used; the message says why."""


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """Decode a whole audio file (whatever libsndfile reads: FLAC, WAV, OGG, MP3) and mix it down to mono.

    Returns:
        float32 [samples] and the sample rate in Hz.

    Raises:
        BadSample: undecodable, empty, silent (peak below 1e-4), NaN or infinite.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            audio, rate = file.read(dtype="float32"), file.samplerate
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise BadSample(f"undecodable audio: {error}") from None
    if audio.ndim == 2:
        audio = audio.mean(axis=1)
    check(audio)
    return audio, rate


def check(audio: np.ndarray) -> None:
    """Raise BadSample for audio [samples] that is empty, silent, NaN or infinite."""
    if audio.size == 0:
        raise BadSample("empty audio")
    peak = max(float(audio.max()), -float(audio.min()))
    if not math.isfinite(peak):
        raise BadSample("NaN or infinite audio")
    if peak < SILENCE:
        raise BadSample(f"silent audio: peak {peak:.1e}, at least {SILENCE:.0e} is needed")


def resample(audio: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Resample float32 [samples] from `rate` to `target_rate` Hz; the result has ceil(samples * target / rate)."""
    if rate == target_rate:
        return audio
    divisor = math.gcd(rate, target_rate)
    if max(rate, target_rate) // divisor <= LARGEST_RATIO_TERM:
        import torch
        import torchaudio.functional

        return torchaudio.functional.resample(torch.from_numpy(audio), rate, target_rate).numpy()
    import scipy.signal

    return scipy.signal.resample(audio, -(-len(audio) * target_rate // rate)).astype(np.float32)


def fit_length(audio: np.ndarray, samples: int, rng: np.random.Generator | None) -> np.ndarray:
    """Cut or zero-pad float32 [any] to [samples].

    A longer clip is cut at a random place drawn from `rng`, or in the middle when `rng` is None; a shorter one keeps
    its start and is padded at its end.
    """
    spare = len(audio) - samples
    if spare == 0:
        return audio
    if spare < 0:
        return np.pad(audio, (0, -spare))
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return audio[start : start + samples]
