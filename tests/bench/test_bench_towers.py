from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ask_dist.bench import towers
from ask_dist.config import Model
from ask_dist.models.audio import build_audio_encoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sample_rate", "save", "millions"),
    [
        ("clap-htsat", 48_000, towers.save_clap_htsat, 28),
        ("ast", 16_000, towers.save_ast, 86),
        ("whisper", 16_000, towers.save_whisper, 8),
        ("cnn14", 32_000, towers.save_cnn14, 80),
    ],
)
def test_towers_are_as_large_as_published(
    name: str, sample_rate: int, save: Callable[[Path], Path], millions: int, tmp_path: Path
) -> None:
    config = Model.model_validate({"audio": {"name": name, "source": str(save(tmp_path / name))}})
    encoder = build_audio_encoder(config, sample_rate)
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=1)
