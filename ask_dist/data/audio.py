"""Decoding, resampling and cutting of mono waveforms."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

SILENCE = 1e-4
# Full scale is 1. The power of a spectrum overflows float32 far above, and one such clip would cost its whole step.
LOUDEST = 100.0
# torchaudio's resampler builds one filter per output phase, so its cost grows with the reduced ratio's terms.
LARGEST_RATIO_TERM = 1000
MOST_DECODED = 2**28  # samples of all channels, 1 GiB of float32, where a length is limited


class BadSample(ValueError):
    """A clip that can't be used; the message says why."""


def decode(data: bytes, longest: float | None = None, room: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Decode a whole audio file (whatever libsndfile reads: FLAC, WAV, OGG, MP3) and mix it down to mono.

    Args:
        data: the file's bytes.
        longest: in seconds; refuse what its header calls longer, before memory is taken for it. None: no limit.
        room: float32 [any], that mono audio is decoded into if it is long enough; else it is left as it is.

    Returns:
        float32 [samples], which may be a part of `room`, and the sample rate in Hz.

    Raises:
        BadSample: undecodable, too long, empty, silent (peak below 1e-4), too loud (above 100), NaN or infinite.
    """
    decoded = decode_channels(data, longest, room)
    audio = mono(decoded.samples)
    check(audio)
    return audio, decoded.rate


def mono(samples: np.ndarray) -> np.ndarray:
    """The mean over the channels of float32 [samples, channels]."""
    return samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]


@dataclass(frozen=True)
class Decoded:
    """An audio file's float32 [samples, channels], its sample rate in Hz, and libsndfile's name of its format."""

    samples: np.ndarray
    rate: int
    format: str


def decode_channels(
    data: bytes | io.BytesIO | io.FileIO, longest: float | None = None, room: np.ndarray | None = None
) -> Decoded:
    """Like `decode`, with all channels as they are and without a look at what they hold, also of a file at its start.

    Raises:
        BadSample: undecodable, or too long.
    """
    source: Any = io.BytesIO(data) if isinstance(data, bytes) else data
    if isinstance(data, io.FileIO):  # libsndfile reads it by itself; by its name it would guess at what is no sound
        source = data.fileno()
    try:
        with soundfile.SoundFile(source, closefd=False) as file:
            seconds = file.frames / file.samplerate
            if longest is not None and seconds > longest:
                raise BadSample(f"too long: {seconds:.1f} s by its header, at most {longest:g} s are taken")
            if longest is not None and file.frames * file.channels > MOST_DECODED:
                raise BadSample(f"too large: {file.channels} channels of {file.frames} samples")
            fits = room is not None and file.channels == 1 and file.frames <= len(room)
            out = room[: file.frames, None] if room is not None and fits else None
            samples = file.read(dtype="float32", always_2d=True, out=out)
            return Decoded(samples, file.samplerate, file.format)
    except BadSample:
        raise
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise _undecodable(error) from None


def seconds(data: bytes) -> float:
    """How long an audio file is by its header.

    Raises:
        BadSample: it has no header that can be read.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return file.frames / file.samplerate
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise _undecodable(error) from None


def _undecodable(error: Exception) -> BadSample:
    """What libsndfile says, without the number or address that it knows the file by."""
    return BadSample(f"undecodable audio: {getattr(error, 'error_string', error)}")


def check(audio: np.ndarray) -> float:
    """The peak of audio [samples] or [samples, channels].

    Raises:
        BadSample: it is empty, silent, too loud, NaN or infinite.
    """
    if audio.size == 0:
        raise BadSample("empty audio")
    peak = max(float(audio.max()), -float(audio.min()))
    if not math.isfinite(peak):
        raise BadSample("NaN or infinite audio")
    if peak < SILENCE:
        raise BadSample(f"silent audio: peak {peak:.1e}, at least {SILENCE:.0e} is needed")
    if peak > LOUDEST:
        raise BadSample(f"too loud: peak {peak:.4g}, at most {LOUDEST:g} times full scale is taken")
    return peak


def resample(audio: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Resample float32 [..., samples] from `rate` to `target_rate` Hz to ceil(samples * target / rate)."""
    if rate == target_rate:
        return audio
    divisor = math.gcd(rate, target_rate)
    if max(rate, target_rate) // divisor <= LARGEST_RATIO_TERM:
        import torch
        import torchaudio.functional

        return torchaudio.functional.resample(torch.from_numpy(audio), rate, target_rate).numpy()
    import scipy.signal

    return scipy.signal.resample(audio, -(-audio.shape[-1] * target_rate // rate), axis=-1).astype(np.float32)


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


def in_samples(sample_rate: int, clip_seconds: float, length_step: float | None) -> tuple[int, int]:
    """The samples of the longest clip, and what lengths are multiples of as `own_length` takes it."""
    return round(clip_seconds * sample_rate), round((length_step or 0.0) * sample_rate)


def own_length(length: int, longest: int, step: int) -> int:
    """The samples that an encoder gets of a clip of `length` samples: whole steps, and at most the longest.

    Args:
        length: of the clip as it was decoded.
        longest: of all clips.
        step: what lengths are multiples of; 0 gives all clips the longest.
    """
    return min(longest, -(-length // step) * step) if step else longest
