import numpy as np
import pytest

from ask_dist.evaluate.long_tail import frequency_groups, long_tail_metrics

TEN = {f"c{i}": 1000 // (i + 1) for i in range(10)}


def test_ten_classes_are_two_three_and_five():
    groups = frequency_groups(TEN)
    assert [groups[name] for name in TEN] == ["head"] * 2 + ["mid"] * 3 + ["tail"] * 5


def test_the_order_of_the_dictionary_does_not_matter():
    assert frequency_groups(dict(reversed(TEN.items()))) == frequency_groups(TEN)


def test_a_balanced_corpus_is_all_mid():
    assert set(frequency_groups(dict.fromkeys("abcdefg", 50)).values()) == {"mid"}


def test_equal_counts_share_a_group():
    counts = {"a": 90, "b": 50, **dict.fromkeys("cdefghij", 1)}
    groups = frequency_groups(counts)
    assert {groups[name] for name in "cdefghij"} == {"tail"}
    assert groups["a"] == groups["b"] == "head"


def test_a_class_without_training_clips_is_tail_and_leaves_the_others_alone():
    assert frequency_groups(TEN | {"unseen": 0}) == frequency_groups(TEN) | {"unseen": "tail"}


def test_a_query_belongs_to_its_rarest_class():
    ranks = np.array([1, 2, 1, 11, 1, 10])
    classes = [["c0"], ["c0", "c1"], ["c0", "c2"], ["c9", "c0"], ["never met", "c0"], []]
    found = long_tail_metrics(ranks, classes, TEN)
    assert found is not None
    assert found["head"] == {"queries": 2, "R@1": 50.0, "R@10": 100.0}
    assert found["mid"] == {"queries": 1, "R@1": 100.0, "R@10": 100.0}
    assert found["tail"] == {"queries": 2, "R@1": 50.0, "R@10": 50.0}


def test_a_group_without_queries_has_no_recall():
    found = long_tail_metrics(np.array([1]), [["c0"]], TEN)
    assert found is not None
    assert found["tail"] == {"queries": 0, "R@1": None, "R@10": None}


def test_bins_hold_every_classed_query_once_by_the_rarest_class():
    counts = {"a": 1, "b": 2, "c": 3, "d": 29, "e": 30, "f": 2_000_000}
    classes = [["a"], ["b", "f"], ["c"], ["d"], ["e"], ["f"], ["new", "f"]]
    found = long_tail_metrics(np.array([1, 20, 1, 5, 1, 1, 3]), classes, counts)
    assert found is not None
    assert [(b["low"], b["high"], b["queries"], b["R@1"]) for b in found["bins"]] == [
        (0, 0, 1, 0.0),
        (1, 2, 2, 50.0),
        (3, 9, 1, 100.0),
        (10, 29, 1, 0.0),
        (30, 99, 1, 100.0),
        (1_000_000, None, 1, 100.0),
    ]


def test_no_classes_no_long_tail():
    assert long_tail_metrics(np.array([1]), [["a"]], {}) is None
    assert long_tail_metrics(np.array([1, 2]), [[], []], TEN) is None


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 ranks but 1 class lists"):
        long_tail_metrics(np.array([1, 2]), [["a"]], TEN)
