"""Recall by how often training met a class: head, mid and tail, and finer bins for a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import numpy as np
from scipy.stats import rankdata

Group = Literal["head", "mid", "tail"]
GROUPS: tuple[Group, ...] = ("head", "mid", "tail")
HEAD_SHARE, TAIL_SHARE = 0.2, 0.5
BIN_EDGES = (0, 1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)

# The functional form, because "R@1" is no Python name.
Recall = TypedDict("Recall", {"queries": int, "R@1": float | None, "R@10": float | None})
FrequencyBin = TypedDict(
    "FrequencyBin", {"low": int, "high": int | None, "queries": int, "R@1": float | None, "R@10": float | None}
)


class LongTail(TypedDict):
    """Recall in percent of each group (None for one without queries), and of each frequency bin that has queries.

    A bin covers training counts from `low` to `high`, both included; `high` is None for the last, open one.
    """

    head: Recall
    mid: Recall
    tail: Recall
    bins: list[FrequencyBin]


def frequency_groups(class_counts: Mapping[str, int]) -> dict[str, Group]:
    """Sort the classes into head, mid and tail by their number of training clips.

    Classes are ordered from the most to the least frequent. The first 20% of them are the head (the 80/20 rule's
    share), the last 50% the tail, the others mid. Shares of the classes rather than fixed counts (such as "fewer
    than 20 clips") because corpora here differ in size by orders of magnitude. Classes of equal count share their mean
    position and so their group: a balanced corpus is all mid, with neither head nor tail. A class with no training clip
    is tail.

    Args:
        class_counts: training clips by class, as `sizes.json` holds them under "classes".
    """
    seen = {name: count for name, count in class_counts.items() if count > 0}
    position = (rankdata([-count for count in seen.values()]) - 0.5) / max(len(seen), 1)
    groups: dict[str, Group] = dict.fromkeys(class_counts, "tail")
    for name, share in zip(seen, position, strict=True):
        groups[name] = "head" if share < HEAD_SHARE else "tail" if share > 1 - TAIL_SHARE else "mid"
    return groups


def query_groups(query_classes: Sequence[Sequence[str]], class_counts: Mapping[str, int]) -> list[Group | None]:
    """The frequency group of each query's rarest class; None for a query without classes.

    Args:
        query_classes: the classes of the clip that each query belongs to. One that `class_counts` lacks counts 0.
        class_counts: training clips by class.
    """
    groups = frequency_groups(class_counts)
    rarest = [min(classes, key=lambda name: class_counts.get(name, 0), default=None) for classes in query_classes]
    return [None if name is None else groups.get(name, "tail") for name in rarest]


def long_tail_metrics(
    ranks: np.ndarray, query_classes: Sequence[Sequence[str]], class_counts: dict[str, int]
) -> LongTail | None:
    """Recall of the queries of each frequency group. A query belongs to the group of its rarest class.

    Args:
        ranks: int64 [q] from 1, `retrieval.ranks(...)["text_to_audio"].rank`.
        query_classes: q lists, the classes of the clip that each text describes. A class that `class_counts` lacks was
            never seen in training and counts 0. A query without classes belongs nowhere and is left out.
        class_counts: training clips by class.

    Returns:
        None where the training corpus, or every query, has no classes.

    Raises:
        ValueError: `ranks` and `query_classes` differ in length.
    """
    if len(ranks) != len(query_classes):
        raise ValueError(f"{len(ranks)} ranks but {len(query_classes)} class lists: pass one list for each query")
    classed = np.array([len(classes) > 0 for classes in query_classes], dtype=bool)
    if not class_counts or not classed.any():
        return None
    ranks = np.asarray(ranks)[classed]
    group = np.array(query_groups(query_classes, class_counts))[classed]
    count = np.array([min(class_counts.get(name, 0) for name in classes) for classes in query_classes if classes])
    head, mid, tail = (_recall(ranks[group == name]) for name in GROUPS)
    return {"head": head, "mid": mid, "tail": tail, "bins": _frequency_bins(ranks, count)}


def _recall(ranks: np.ndarray) -> Recall:
    if len(ranks) == 0:
        return {"queries": 0, "R@1": None, "R@10": None}
    return {"queries": len(ranks), "R@1": 100 * float((ranks <= 1).mean()), "R@10": 100 * float((ranks <= 10).mean())}


def _frequency_bins(ranks: np.ndarray, counts: np.ndarray) -> list[FrequencyBin]:
    place = np.searchsorted(BIN_EDGES, counts, side="right") - 1
    bins: list[FrequencyBin] = []
    for index in np.unique(place):
        high = BIN_EDGES[index + 1] - 1 if index + 1 < len(BIN_EDGES) else None
        bins.append({"low": BIN_EDGES[index], "high": high, **_recall(ranks[place == index])})
    return bins
