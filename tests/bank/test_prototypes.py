"""Prototypes pair the means of the same clip groups in both modalities."""

from __future__ import annotations

import numpy as np

from ask_dist.bank.prototypes import build_prototypes, unit_rows


def grouped_pairs(rng, groups: int, each: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth = np.repeat(np.arange(groups), each)
    audio_centre, text_centre = unit_rows(rng.normal(size=(groups, dim))), unit_rows(rng.normal(size=(groups, dim)))
    noise = 0.02 * rng.normal(size=(2, groups * each, dim))
    return unit_rows(audio_centre[truth] + noise[0]), unit_rows(text_centre[truth] + noise[1]), truth


def test_each_prototype_is_the_paired_mean_of_one_group(rng):
    audio, text, truth = grouped_pairs(rng, groups=2, each=30, dim=20)
    ((audio_level, text_level),) = build_prototypes(audio, text, levels=[2], seed=0)
    expected_audio = unit_rows(np.stack([audio[truth == group].mean(0) for group in range(2)]))
    expected_text = unit_rows(np.stack([text[truth == group].mean(0) for group in range(2)]))
    match = (audio_level.astype(np.float32) @ expected_audio.T).argmax(1)
    assert sorted(match) == list(range(2))
    np.testing.assert_allclose(audio_level, expected_audio[match], atol=2e-3)
    np.testing.assert_allclose(text_level, expected_text[match], atol=2e-3)


def test_levels_keep_their_order_and_are_unit_length(rng):
    audio, text, _ = grouped_pairs(rng, groups=10, each=20, dim=12)
    levels = build_prototypes(audio, text, levels=[4, 16], seed=1)
    assert [len(audio_level) for audio_level, _ in levels] == [4, 16]
    for level in levels:
        for side in level:
            assert side.dtype == np.float16
            np.testing.assert_allclose(np.linalg.norm(side.astype(np.float32), axis=1), 1, atol=2e-3)


def test_a_level_wider_than_the_bank_is_left_out(rng):
    audio, text, _ = grouped_pairs(rng, groups=2, each=5, dim=8)
    assert [len(level) for level, _ in build_prototypes(audio, text, levels=[2, 11], seed=0)] == [2]
    assert build_prototypes(audio[:0], text[:0], levels=[2], seed=0) == []


def test_the_same_seed_gives_the_same_prototypes(rng):
    audio, text, _ = grouped_pairs(rng, groups=5, each=20, dim=8)
    first, second = (build_prototypes(audio, text, levels=[7], seed=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_many_rows_are_learned_from_a_sample_and_all_are_averaged(rng):
    audio, text, truth = grouped_pairs(rng, groups=2, each=6000, dim=6)  # more than a sample or a block holds
    audio[:200], truth[:200] = -audio[:200], -1  # a few that belong to neither
    ((audio_level, text_level),) = build_prototypes(audio.astype(np.float16), text.astype(np.float16), [2], seed=0)
    centres = np.stack([audio[truth == group].mean(0) for group in range(2)])
    match = (unit_rows(centres) @ audio_level.astype(np.float32).T).argmax(1)
    assert sorted(match) == [0, 1]
    pairs = np.concatenate([audio, text], axis=1)
    means = np.concatenate([audio_level, text_level], axis=1).astype(np.float32)
    members = (pairs @ means.T).argmax(1)
    for prototype in range(2):
        for level, rows in ((audio_level, audio), (text_level, text)):
            np.testing.assert_allclose(
                level[prototype], unit_rows(rows[members == prototype].mean(0)[None])[0], atol=3e-3
            )
