from collections.abc import Callable

import numpy as np
import pytest
import torch

from ask_dist.errors import InputError
from ask_dist.evaluate.retrieval import TIE, bootstrap_interval, ranks, retrieval_metrics


def embed(similarity: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit audio [n, n+m] and text [m, n+m] rows whose cosines are the given [n, m] matrix, halved."""
    matrix = torch.tensor(similarity) / 2
    n, m = matrix.shape
    audio = torch.cat([torch.eye(n), torch.zeros(n, m)], dim=1)
    rest = (1 - matrix.square().sum(dim=0)).sqrt()
    return audio, torch.cat([matrix.T, torch.diag(rest)], dim=1)


def slow(audio: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> dict[str, tuple[list[int], list[float]]]:
    """Sort one explicit list a query, the wrong item first among ties, and walk down it."""
    audio, text = torch.nn.functional.normalize(audio, dim=1), torch.nn.functional.normalize(text, dim=1)
    similarity = (audio.double() @ text.double().T).numpy().round(6)

    def walk(scores: np.ndarray, right: Callable[[int], bool]) -> tuple[int, float]:
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], right(j)))
        places = [place for place, j in enumerate(order, start=1) if right(j)]
        found = sum((i + 1) / place for i, place in enumerate(places) if place <= 10)
        return places[0], found / min(len(places), 10)

    to_audio = [walk(similarity[:, i], lambda j, i=i: j == int(owner[i])) for i in range(len(text))]
    to_text = [walk(similarity[i], lambda j, i=i: int(owner[j]) == i) for i in range(len(audio))]
    return {
        "text_to_audio": ([rank for rank, _ in to_audio], [precision for _, precision in to_audio]),
        "audio_to_text": ([rank for rank, _ in to_text], [precision for _, precision in to_text]),
    }


def assert_equals_slow(audio: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, chunk: int) -> None:
    fast = ranks(audio, text, owner, chunk)
    for direction, (rank, precision) in slow(audio, text, owner).items():
        assert fast[direction].rank.tolist() == rank
        assert fast[direction].average_precision == pytest.approx(precision, abs=1e-12)


def test_one_caption_a_clip_with_known_places():
    audio, text = embed([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.5, 0.4]])
    found = ranks(audio, text, torch.arange(3))
    assert found["text_to_audio"].rank.tolist() == [1, 2, 1]
    assert found["audio_to_text"].rank.tolist() == [1, 2, 2]
    assert found["text_to_audio"].metrics() == pytest.approx(
        {"R@1": 200 / 3, "R@5": 100.0, "R@10": 100.0, "mAP@10": 100 * 2.5 / 3, "median_rank": 1.0}
    )


def test_two_captions_a_clip_with_known_precision():
    # Clip 0 owns texts 0 and 2, found at places 1 and 3; clip 1 owns 1 and 3, found at places 2 and 4.
    audio, text = embed([[0.9, 0.8, 0.7, 0.1], [0.6, 0.5, 0.4, 0.3]])
    owner = torch.tensor([0, 1, 0, 1])
    found = ranks(audio, text, owner)["audio_to_text"]
    assert found.rank.tolist() == [1, 2]
    assert found.average_precision.tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2])


def test_more_than_ten_right_captions_can_reach_a_precision_of_one():
    audio, text = embed([[0.3] * 12 + [0.1], [0.0] * 12 + [0.2]])
    owner = torch.tensor([0] * 12 + [1])
    assert ranks(audio, text, owner)["audio_to_text"].average_precision.tolist() == [1.0, 1.0]


def test_a_tied_wrong_item_ranks_first():
    audio, text = embed([[0.5, 0.5, 0.1], [0.5, 0.4, 0.1], [0.2, 0.4, 0.3]])
    found = ranks(audio, text, torch.arange(3))
    assert found["text_to_audio"].rank.tolist() == [2, 3, 1]
    assert found["audio_to_text"].rank.tolist() == [2, 2, 2]


@pytest.mark.parametrize("noise", [0.0, TIE / 100])
def test_collapsed_embeddings_find_nothing(noise):
    generator = torch.Generator().manual_seed(0)
    point = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator), dim=1)
    audio, text = (point + noise * torch.randn(50, 64, generator=generator) for _ in range(2))
    found = retrieval_metrics(audio, text, torch.arange(50), chunk=7)
    for direction in found.values():
        assert direction == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "mAP@10": 0.0, "median_rank": 50.0}


def test_embeddings_that_are_no_number_find_nothing():
    audio = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    text = audio.clone()
    text[3] = torch.nan
    found = ranks(audio, text, torch.arange(20))
    assert found["text_to_audio"].rank.tolist() == [20 if i == 3 else 1 for i in range(20)]
    assert found["audio_to_text"].rank.tolist() == [20 if i == 3 else 2 for i in range(20)]


@pytest.mark.parametrize("captions", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 16, 1000])
def test_equals_the_slow_one(captions, chunk):
    generator = torch.Generator().manual_seed(captions)
    audio = torch.randn(40, 12, generator=generator)
    owner = torch.arange(40).repeat_interleave(captions)[torch.randperm(40 * captions, generator=generator)]
    text = audio[owner] + 1.5 * torch.randn(len(owner), 12, generator=generator)
    assert_equals_slow(audio, text, owner, chunk)


def test_equals_the_slow_one_with_many_ties_and_uneven_numbers_of_captions():
    generator = torch.Generator().manual_seed(9)
    audio = torch.randint(-1, 2, (30, 4), generator=generator).float() + torch.tensor([0.0, 0, 0, 2])
    owner = torch.cat([torch.arange(30), torch.randint(0, 30, (70,), generator=generator)])
    text = torch.randint(-1, 2, (100, 4), generator=generator).float() + torch.tensor([0.0, 0, 0, 2])
    assert_equals_slow(audio, text, owner, chunk=13)


def test_half_precision_features_are_compared_in_float32():
    audio = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    found, wide = (retrieval_metrics(a, a, torch.arange(64)) for a in (audio, audio.float()))
    assert found == wide


@pytest.mark.parametrize(
    ("texts", "owner", "message"),
    [
        (3, [0, 0, 2], "1 of 3 clips have no caption, the first is clip 1"),
        (3, [0, 1, 3], r"owners 0\.\.3 must lie in 0\.\.2"),
        (2, [0, 1, 2], "one clip position for each of 2 texts"),
        (0, [], "0 captions to evaluate"),
    ],
)
def test_bad_owners_are_named(texts, owner, message):
    with pytest.raises(InputError, match=message):
        ranks(torch.eye(3), torch.ones(texts, 3), torch.tensor(owner, dtype=torch.int64))


def test_features_of_two_widths_are_refused():
    with pytest.raises(InputError, match=r"audio \(3, 3\) and text \(3, 2\)"):
        ranks(torch.eye(3), torch.ones(3, 2), torch.arange(3))


def test_interval_agrees_with_the_normal_one_and_is_repeatable():
    values = 100.0 * (np.random.default_rng(0).random(2000) < 0.3)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.25)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(np.full(5, 40.0), seed=0) == (40.0, 40.0)


def test_queries_that_stand_and_fall_together_widen_the_interval():
    clips = 100.0 * (np.random.default_rng(2).random(200) < 0.5)
    low, high = bootstrap_interval(clips, seed=3)
    five = bootstrap_interval(np.repeat(clips, 5), seed=3, cluster=np.repeat(np.arange(200), 5))
    assert five == pytest.approx((low, high))
    narrow = bootstrap_interval(np.repeat(clips, 5), seed=3)
    assert narrow[1] - narrow[0] < 0.6 * (high - low)


def test_no_values_have_no_interval():
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_interval(np.array([]), seed=0)
