"""The dry run's one step: whatever is to learn has a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from ask_dist import config as configuration
from ask_dist.config import Model
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.models.audio import AudioEncoder, register_audio_encoder
from ask_dist.train.check import synthetic_step
from tests.finished_run import noise_corpus
from tests.models.conftest import needs_pretrained
from tests.models.towers import save_clap, save_roberta

SMALL = {
    "audio": {"width": 8, "mel_bins": 16},
    "text": {"width": 16, "heads": 2, "max_tokens": 16, "vocabulary": 300},
}


class Detached(AudioEncoder):
    """Two layers, of which nothing leads to the first, or to either."""

    def __init__(self, sample_rate: int, learning: bool) -> None:
        super().__init__()
        self.sample_rate, self.output_dim, self.learning = sample_rate, 4, learning
        self.low, self.high = nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, audio: Tensor) -> Tensor:
        low = self.low(audio.std(dim=1, keepdim=True)).detach()
        return self.high(low) if self.learning else self.high(low).detach()


@register_audio_encoder("detached")
def _detached(config: Model, sample_rate: int) -> AudioEncoder:
    return Detached(sample_rate, **config.audio.options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_corpus(tmp_path_factory.mktemp("corpus") / "train", 12)


def step(corpus: Path, audio: dict[str, Any], text: dict[str, Any], **sections: dict[str, Any]) -> float:
    model = {"embedding_dim": 8, "audio": SMALL["audio"] | audio, "text": SMALL["text"] | text}
    data = {"train": str(corpus), "clip_seconds": 0.5} | sections.pop("data", {})
    tree = {"name": "noise", "data": data, "model": model, "optimization": {"micro_batch_size": 8} | sections}
    return synthetic_step(configuration.parse(tree), ShardList.load(corpus))[0]


@pytest.mark.parametrize(("learning", "count"), [(True, 2), (False, 4)])
def test_weights_that_would_never_learn_are_refused(corpus, learning, count):
    line = rf"^{count} weights that are to learn get no gradient, audio\.low\.weight among them; "
    with pytest.raises(InputError, match=line) as error:
        step(corpus, {"name": "detached", "options": {"learning": learning}}, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tower", [{"freeze": True}, {"freeze": True, "unfreeze_at": 0.5}])
def test_a_frozen_tower_needs_no_gradient(corpus, tower):
    assert step(corpus, {"name": "detached", "options": {"learning": False}} | tower, {}) > 0
    assert step(corpus, {}, tower) > 0


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_all_of_a_model_learns_under_either_loss(corpus, loss):
    assert step(corpus, {}, {}, loss=loss) > 0


def test_adapters_that_learn_are_taken(corpus):
    needs_pretrained()
    pytest.importorskip("peft", reason="needs the extra ask-dist[pretrained]")
    lora = {"lora": {"targets": "all-linear"}}
    assert step(corpus, {"name": "yamnet", "lora": {"targets": ["network.6", "network.11"]}}, lora) > 0


@pytest.mark.parametrize("lora", [{}, {"lora": {"targets": "all-linear"}}])
def test_what_pretrained_towers_do_not_use_is_not_to_learn(corpus, lora, tmp_path):
    needs_pretrained()
    clap, roberta = save_clap(tmp_path / "clap", enable_fusion=True), save_roberta(tmp_path / "roberta")
    audio = {"name": "clap-htsat", "source": str(clap)} | lora
    assert step(corpus, audio, {"name": "automodel", "source": str(roberta)} | lora, data={"sample_rate": 8000}) > 0
