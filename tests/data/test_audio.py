from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_dist.data.audio import BadSample, decode, decode_channels, fit_length, resample, seconds


def encoded(audio: np.ndarray, rate: int = 8000, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=kind, subtype=subtype)
    return file.getvalue()


def sine(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_decode_gives_mono_float32_of_any_format(kind: str, subtype: str) -> None:
    left = sine(8000) / 2
    audio, rate = decode(encoded(np.stack([left, left * 0.5], axis=1), kind=kind, subtype=subtype))
    assert (audio.dtype, audio.shape, rate) == (np.float32, left.shape, 8000)
    np.testing.assert_allclose(audio, left * 0.75, atol=0.05 if kind == "OGG" else 1e-4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"no audio at all", "undecodable"),
        (encoded(sine(8000))[:30], "undecodable"),
        (encoded(np.zeros(0, np.float32)), "empty"),
        (encoded(np.full(100, 9e-5, np.float32)), "silent"),
        (encoded(np.array([0.1, np.nan], np.float32)), "NaN"),
        (encoded(np.array([0.1, -np.inf], np.float32)), "infinite"),
        (encoded(np.array([0.1, -101.0], np.float32)), "too loud: peak 101, at most 100 times full scale"),
    ],
)
def test_decode_says_what_is_bad(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode(data)


@pytest.mark.parametrize("peak", [-1.1e-4, -99.0])
def test_the_quietest_and_the_loudest_usable_clips_are_kept(peak: float) -> None:
    assert decode(encoded(np.full(100, peak, np.float32)))[0].shape == (100,)


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_a_header_tells_the_length(kind: str, subtype: str) -> None:
    assert seconds(encoded(sine(8000, 1.25), kind=kind, subtype=subtype)) == 1.25
    with pytest.raises(BadSample, match="undecodable"):
        seconds(b"no audio at all")


@pytest.mark.parametrize("rate", [44100, 48000, 22050, 8000, 16000, 31571, 15999])
def test_resample_keeps_a_tone(rate: int) -> None:
    heard = resample(sine(rate), rate, 16000)
    assert heard.dtype == np.float32
    assert len(heard) == 16000
    np.testing.assert_allclose(heard[1000:-1000], sine(16000)[1000:-1000], atol=0.01)


def test_fit_length() -> None:
    audio = np.arange(1, 11, dtype=np.float32)
    np.testing.assert_array_equal(fit_length(audio, 12, None), [*audio, 0, 0])
    np.testing.assert_array_equal(fit_length(audio, 4, None), [4, 5, 6, 7])
    np.testing.assert_array_equal(fit_length(audio, 10, None), audio)
    starts = {fit_length(audio, 8, np.random.default_rng(seed))[0] for seed in range(50)}
    assert starts == {1, 2, 3}


@pytest.mark.parametrize("samples", [60, 100])
@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_mono_that_fits_is_decoded_where_there_is_room(samples: int, kind: str) -> None:
    data = encoded(np.random.default_rng(0).uniform(-0.9, 0.9, samples), kind=kind, subtype="PCM_16")
    room = np.full(100, 7.0, np.float32)
    audio, _ = decode(data, room=room)
    assert np.shares_memory(audio, room)
    np.testing.assert_array_equal(audio, decode(data)[0])
    np.testing.assert_array_equal(room[samples:], 7.0)


@pytest.mark.parametrize("shape", [(101,), (50, 2)])
def test_what_does_not_fit_leaves_the_room_as_it_is(shape: tuple[int, ...]) -> None:
    data = encoded(np.random.default_rng(0).uniform(-0.9, 0.9, shape))
    room = np.full(100, 7.0, np.float32)
    np.testing.assert_array_equal(decode(data, room=room)[0], decode(data)[0])
    np.testing.assert_array_equal(room, 7.0)


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", "PCM_16"), ("WAV", "FLOAT"), ("OGG", "VORBIS"), ("MP3", None)])
def test_a_file_is_decoded_as_its_bytes_are(kind: str, subtype: str | None, tmp_path: Path) -> None:
    path = tmp_path / "sound.raw"  # a name by which libsndfile would take anything for samples
    soundfile.write(path, sine(16000), 16000, format=kind, subtype=subtype)
    with io.FileIO(path) as file:
        found = decode_channels(file)
        assert not file.closed
    expected = decode_channels(path.read_bytes())
    assert (found.rate, found.format) == (expected.rate, expected.format)
    np.testing.assert_array_equal(found.samples, expected.samples)


def test_what_is_no_sound_is_none_whatever_its_name(tmp_path: Path) -> None:
    for name in ("page.au", "page.vox", "page.raw"):
        (tmp_path / name).write_bytes(b"<html>" * 100)
        with io.FileIO(tmp_path / name) as file, pytest.raises(BadSample, match="undecodable audio: Format not"):
            decode_channels(file)
