"""The bank against slow and obvious references: brute force search, and a dictionary of rows."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit
from ask_dist.bank.prototypes import unit_rows
from ask_dist.bank.rows import CHUNK_ROWS
from ask_dist.errors import InputError

DIM = 16


def unit(rng, rows: int, dim: int = DIM) -> np.ndarray:
    return unit_rows(rng.normal(size=(rows, dim)))


def filled_bank(rng, rows: int = 300, **settings) -> tuple[KnowledgeBank, np.ndarray, np.ndarray, np.ndarray]:
    bank = KnowledgeBank(DIM, capacity=1000, dtype="float32", **settings)
    ids = rng.permutation(10_000)[:rows].astype(np.int64) - 5000
    audio, text = unit(rng, rows), unit(rng, rows)
    bank.upsert(ids, audio, text, None, step=0)
    return bank, ids, audio, text


def neighbours_by_sorting(ids, audio, text, asked, k) -> set[int]:
    others = [row for row in range(len(ids)) if ids[row] not in asked]
    found: set[int] = set()
    for query in (row for row in range(len(ids)) if ids[row] in asked):
        for rows in (audio, text):
            ranked = sorted(others, key=lambda row: -float(rows[query] @ rows[row]))
            found |= {int(ids[row]) for row in ranked[:k]}
    return found


@pytest.mark.parametrize(("asked", "k"), [(1, 4), (20, 4), (20, 16), (100, 8), (298, 5), (300, 3)])
def test_search_by_id_equals_brute_force_and_never_answers_the_asked(rng, asked, k):
    bank, ids, audio, text = filled_bank(rng)
    chosen = rng.choice(ids, asked, replace=False)
    knowledge = bank.search_ids(chosen, k)
    assert set(knowledge.ids.tolist()) == neighbours_by_sorting(ids, audio, text, set(chosen.tolist()), k)
    assert len(set(knowledge.ids.tolist())) == len(knowledge.ids)


def test_a_batch_of_near_duplicates_still_gets_its_k_neighbours(rng):
    bank, ids, audio, text = filled_bank(rng)
    audio[:60] = unit_rows(audio[0] + 0.01 * rng.normal(size=(60, DIM)))
    text[:60] = unit_rows(text[0] + 0.01 * rng.normal(size=(60, DIM)))
    bank.upsert(ids, audio, text, None, step=1)
    knowledge = bank.search_ids(ids[:60], 5)
    assert set(knowledge.ids.tolist()) == neighbours_by_sorting(ids, audio, text, set(ids[:60].tolist()), 5)


def test_an_answer_carries_the_stored_rows_in_order(rng):
    bank, ids, audio, text = filled_bank(rng)
    reliability = rng.random(50).astype(np.float32)
    bank.upsert(ids[:50], audio[:50], text[:50], reliability, step=9)
    knowledge = bank.search_ids(ids[100:110], 12)
    rows = [ids.tolist().index(i) for i in knowledge.ids]
    assert rows == sorted(rows)
    np.testing.assert_array_equal(knowledge.audio, audio[rows].astype(np.float16))
    np.testing.assert_array_equal(knowledge.text, text[rows].astype(np.float16))
    full = np.concatenate([reliability, np.ones(250, np.float32)])
    np.testing.assert_array_equal(knowledge.reliability, full[rows])
    np.testing.assert_array_equal(knowledge.age, [0 if row < 50 else 9 for row in rows])
    assert (knowledge.rows, knowledge.newest_step, knowledge.generation) == (300, 9, 0)


def test_an_answer_carries_the_asked_ids_own_rows_as_they_were_asked(rng):
    bank, ids, audio, text = filled_bank(rng)
    bank.upsert(ids[:50], audio[:50], text[:50], None, step=9)
    knowledge = bank.search_ids(np.array([ids[120], 99_999, ids[3]]), 4)
    np.testing.assert_array_equal(knowledge.own_audio[[0, 2]], audio[[120, 3]].astype(np.float16))
    np.testing.assert_array_equal(knowledge.own_text[[0, 2]], text[[120, 3]].astype(np.float16))
    assert knowledge.own_age.tolist() == [9, -1, 0]
    assert not knowledge.own_audio[1].any()


def test_unknown_ids_and_an_empty_bank_answer_nothing(rng):
    bank, ids, *_ = filled_bank(rng)
    assert len(bank.search_ids(np.array([99_999]), 4).ids) == 0
    known_only = bank.search_ids(ids[:1], 4)
    np.testing.assert_array_equal(bank.search_ids(np.array([ids[0], 99_999]), 4).ids, known_only.ids)
    empty = KnowledgeBank(DIM, capacity=5).search_ids(ids[:3], 4)
    assert empty.audio.shape == empty.text.shape == (0, DIM)


def test_untrusted_and_old_rows_stay_out_of_answers(rng):
    bank, ids, audio, text = filled_bank(rng, minimum_reliability=0.5, max_age=10)
    bank.upsert(ids[:100], audio[:100], text[:100], np.full(100, 0.4, np.float32), step=20)
    bank.upsert(ids[100:200], audio[100:200], text[100:200], None, step=15)
    answered = set(bank.search_ids(ids[150:250], 300).ids.tolist())
    assert bank.metrics()["bank/too_old_share"] == pytest.approx(1 / 3)
    assert answered == set(ids[100:150].tolist())  # the first hundred are doubted, the last hundred are 20 steps old


def test_free_search_equals_brute_force(rng):
    bank, ids, audio, text = filled_bank(rng)
    queries = unit(rng, 9)
    for modality, rows in (("audio", audio), ("text", text)):
        scores, found = bank.search(queries, 7, modality)
        order = np.argsort(-(queries @ rows.T), axis=1)[:, :7]
        np.testing.assert_array_equal(found, ids[order])
        np.testing.assert_allclose(scores, np.take_along_axis(queries @ rows.T, order, 1), atol=1e-5)


def test_rows_that_are_not_finite_or_older_are_rejected(rng):
    bank = KnowledgeBank(DIM, capacity=10)
    audio, text = unit(rng, 3), unit(rng, 3)
    audio[1, 2] = np.nan
    text[2, 0] = 1e6  # infinite in float16
    assert bank.upsert(np.array([1, 2, 3]), audio, text, None, step=5) == 1
    assert bank.upsert(np.array([1]), unit(rng, 1), unit(rng, 1), None, step=4) == 0
    np.testing.assert_array_equal(bank.snapshot().audio, audio[:1].astype(np.float16))
    metrics = bank.metrics()
    assert (metrics["bank/rows"], metrics["bank/upserts"], metrics["bank/rejected"]) == (1, 1, 3)


def test_a_row_is_heard_if_any_of_its_values_is_not_zero(rng):
    bank = KnowledgeBank(DIM, capacity=10)
    audio = np.zeros((3, DIM), np.float32)
    audio[1, DIM - 1], audio[2, 0] = 1.0, 1.0
    text = unit(rng, 3)
    bank.upsert(np.arange(3), audio, text, None, step=0)
    scores, _ = bank.search(audio[1:], 3, "audio")
    assert np.isneginf(scores).sum(axis=1).tolist() == [1, 1]  # the row of zeros alone is never found by audio


def test_beyond_the_capacity_is_an_input_error_and_writes_nothing(rng):
    bank = KnowledgeBank(DIM, capacity=4)
    bank.upsert(np.arange(3), unit(rng, 3), unit(rng, 3), None, step=0)
    with pytest.raises(InputError, match="5 rows exceed the bank's capacity of 4"):
        bank.upsert(np.arange(2, 5), unit(rng, 3), unit(rng, 3), None, step=1)
    assert len(bank) == 3
    assert (bank.snapshot().step == 0).all()


def test_rows_of_another_width_are_an_input_error(rng):
    bank = KnowledgeBank(DIM, capacity=4)
    with pytest.raises(InputError, match="as wide as the model's embeddings"):
        bank.upsert(np.arange(2), unit(rng, 2, 8), unit(rng, 2, 8), None, step=0)


def test_a_commit_never_overwrites_a_newer_row(rng):
    bank, ids, *_ = filled_bank(rng)
    seen = bank.snapshot()
    newer = unit(rng, 10)
    bank.upsert(ids[:10], newer, newer, None, step=30)
    corrected = unit(rng, 300)
    result = bank.commit(Commit(seen.ids, 3 * corrected, corrected, seen.version, frame=20))
    assert (result.applied, result.skipped, result.generation) == (290, 10, 1)
    now = bank.snapshot()
    np.testing.assert_array_equal(now.audio[:10], newer)
    np.testing.assert_allclose(now.audio[10:], corrected[10:], atol=1e-6)  # and at unit length
    assert (now.frame[:10] == 30).all()
    assert (now.frame[10:] == 20).all()
    assert (now.step[10:] == 0).all()
    assert bank.metrics()["bank/staleness"] == pytest.approx(290 * 10 / 300)


def test_a_commit_of_another_life_changes_nothing_although_ids_and_versions_are_the_same(rng):
    """As of a bank that died, began anew and was filled again while the refiner was at work."""
    bank, ids, audio, text = filled_bank(rng)
    seen, corrected = bank.snapshot(), unit(rng, 300)
    levels = [(corrected[:4], corrected[:4])]
    late = Commit(seen.ids, corrected, corrected, seen.version, 20, levels, life=seen.life)
    again = KnowledgeBank(DIM, capacity=1000, dtype="float32")
    again.upsert(ids, audio, text, None, step=5)
    np.testing.assert_array_equal(again.snapshot().version, seen.version)
    result = again.commit(late)
    assert (result.applied, result.skipped, result.generation) == (0, 300, 0)
    np.testing.assert_array_equal(again.snapshot().audio, audio)
    assert again.prototypes is None
    assert bank.commit(late).applied == 300


def test_a_commit_of_unknown_or_broken_rows_skips_them(rng):
    bank, ids, audio, _ = filled_bank(rng)
    corrected = unit(rng, 2)
    corrected[1, 0] = np.inf
    commit = Commit(np.array([99_999, ids[0]]), corrected, corrected, np.array([1, 1]), frame=3)
    assert bank.commit(commit).applied == 0
    np.testing.assert_array_equal(bank.snapshot().audio, audio)


def test_state_round_trip_keeps_rows_counters_and_prototypes(rng):
    bank, ids, audio, text = filled_bank(rng)
    seen = bank.snapshot()
    levels = [(unit(rng, p).astype(np.float16), unit(rng, p).astype(np.float16)) for p in (2, 4)]
    bank.commit(Commit(seen.ids[:5], audio[5:10], text[5:10], seen.version[:5], frame=2, prototypes=levels))
    again = KnowledgeBank.from_state(bank.state(), dim=DIM, capacity=1000, dtype="float32")
    for name, value in bank.state().items():
        np.testing.assert_array_equal(again.state()[name], value, err_msg=name)
    assert again.metrics() == bank.metrics()
    assert again.prototypes is not None
    assert again.prototypes.generation == 1
    np.testing.assert_array_equal(again.search_ids(ids[:9], 5).ids, bank.search_ids(ids[:9], 5).ids)
    with pytest.raises(InputError, match="300 rows exceed"):
        KnowledgeBank.from_state(bank.state(), dim=DIM, capacity=299)


@dataclass
class SlowRow:
    value: float
    step: int
    frame: int
    version: int


class SlowBank:
    """The order semantics of the bank, one row at a time."""

    def __init__(self) -> None:
        self.rows: dict[int, SlowRow] = {}

    def upsert(self, writes: list[tuple[int, float]], step: int) -> None:
        for i, value in dict(writes).items():
            old = self.rows.get(i)
            if old is None or step >= old.step:
                self.rows[i] = SlowRow(value, step, step, (old.version if old else 0) + 1)

    def commit(self, writes: dict[int, float], versions: dict[int, int], frame: int) -> None:
        for i, value in writes.items():
            row = self.rows.get(i)
            if row is not None and row.version == versions[i]:
                self.rows[i] = SlowRow(value, row.step, frame, row.version + 1)


values = st.sampled_from([-1.0, 1.0])
upserts = st.tuples(st.just("upsert"), st.lists(st.tuples(st.integers(0, 6), values), max_size=8), st.integers(0, 9))
snapshots = st.tuples(st.just("snapshot"), st.none(), st.none())
commits = st.tuples(st.just("commit"), values, st.integers(0, 9))


@given(st.lists(st.one_of(upserts, snapshots, commits), max_size=25))
@settings(max_examples=150, deadline=None)
def test_any_order_of_writes_equals_the_slow_bank(operations):
    bank, slow = KnowledgeBank(1, capacity=7), SlowBank()
    seen = bank.snapshot()
    for kind, payload, step in operations:
        if kind == "upsert":
            ids, rows = np.array([i for i, _ in payload], np.int64), np.array([[v] for _, v in payload]).reshape(-1, 1)
            bank.upsert(ids, rows, -rows, None, step)
            slow.upsert(payload, step)
        elif kind == "snapshot":
            seen = bank.snapshot()
        else:
            corrected = np.full((len(seen.ids), 1), payload)
            bank.commit(Commit(seen.ids, corrected, -corrected, seen.version, frame=step))
            versions = dict(zip(seen.ids.tolist(), seen.version.tolist(), strict=True))
            slow.commit(dict.fromkeys(versions, payload), versions, step)
    now = bank.snapshot()
    stored = zip(now.ids, now.audio[:, 0], now.text[:, 0], now.step, now.frame, now.version, strict=True)
    assert {int(i): (a, t, s, f, v) for i, a, t, s, f, v in stored} == {
        i: (row.value, -row.value, row.step, row.frame, row.version) for i, row in slow.rows.items()
    }


def test_callers_in_many_threads_see_no_torn_rows():
    rows, rounds = 200, 30
    bank = KnowledgeBank(DIM, capacity=rows)
    ids = np.arange(rows)
    torn: list[str] = []

    def whole(step: int) -> np.ndarray:
        return np.full((rows, DIM), 0.25 + step / 64)

    def write() -> None:
        for step in range(1, rounds):
            bank.upsert(ids, whole(step), whole(step), None, step)
            seen = bank.snapshot()
            constant = np.full((rows, DIM), 1.0)
            bank.commit(Commit(seen.ids, constant, constant, seen.version, frame=step))

    def check(audio: np.ndarray, text: np.ndarray, what: str) -> None:
        if len(np.unique(np.concatenate([audio.ravel(), text.ravel()]))) > 1:
            torn.append(what)

    def read() -> None:
        for _ in range(3 * rounds):
            knowledge, seen = bank.search_ids(ids[:20], 4), bank.snapshot()
            check(knowledge.audio, knowledge.text, "search")
            check(seen.audio, seen.text, "snapshot")

    bank.upsert(ids, whole(0), whole(0), None, 0)
    threads = [threading.Thread(target=target) for target in (write, read, read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torn == []
    assert bank.metrics()["bank/searches"] == 2 * 3 * rounds


class SlowSearch:
    """What the bank answers, by the scores of all rows."""

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}
        self.halves: dict[str, dict[int, np.ndarray]] = {"audio": {}, "text": {}}

    def write(self, ids: list[int], audio: np.ndarray, text: np.ndarray) -> None:
        self.versions |= {i: self.versions.get(i, 0) + 1 for i in ids}
        self.halves["audio"] |= dict(zip(ids, audio, strict=True))
        self.halves["text"] |= dict(zip(ids, text, strict=True))

    def near(self, query: np.ndarray, k: int, modality: str, without: set[int]) -> tuple[set[int], set[int]]:
        """The ids that must be among the k nearest, and those that may: equally near ones are as good."""
        others = [i for i in self.versions if i not in without]
        scores = np.stack([self.halves[modality][i] for i in others]) @ query
        last = np.sort(scores)[-k]
        must, may = ({others[j] for j in np.flatnonzero(scores > last + shift)} for shift in (1e-3, -1e-3))
        return must, may


seeds = st.integers(0, 2**20)
operations_on_index = st.one_of(
    st.tuples(st.just("upsert"), seeds, st.sampled_from([3, 40, 200])),
    st.tuples(st.just("commit"), seeds, st.sampled_from([3, 40, 200])),
    st.tuples(st.just("new"), seeds, st.sampled_from([1, 30])),
    st.tuples(st.just("maintain"), seeds, st.just(0)),
    st.tuples(st.just("search_ids"), seeds, st.sampled_from([1, 5, 30])),
    st.tuples(st.just("search"), seeds, st.sampled_from([1, 5])),
)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_pq"])
@given(st.lists(operations_on_index, min_size=3, max_size=12), st.sampled_from(["float16", "float32"]))
@settings(max_examples=40, deadline=None)
def test_any_order_of_writes_and_searches_equals_the_slow_search(kind, operations, dtype):
    # Every list and, with k = 80, more candidates than rows: nothing may be missed.
    k, dim, every = 80, 3, 10**6
    bank, slow = KnowledgeBank(dim, 1000, dtype, index=kind, inverted_from=1, probes=every), SlowSearch()

    def write(ids: list[int], rng, how: str) -> None:
        audio, text = (unit(rng, len(ids), dim).astype(np.float16).astype(np.float32) for _ in range(2))
        if how == "commit":
            versions = np.array([slow.versions[i] for i in ids])
            assert bank.commit(Commit(np.array(ids), audio, text, versions, frame=0)).skipped == 0
        else:
            assert bank.upsert(np.array(ids), audio, text, None, step=0) == len(ids)
        slow.write(ids, audio, text)

    write(list(range(256)), np.random.default_rng(0), "upsert")
    for how, seed, size in [("maintain", 0, 0), *operations]:
        rng, count = np.random.default_rng(seed), len(slow.versions)
        if how in ("upsert", "commit"):
            write(rng.choice(count, size, replace=False).tolist(), rng, how)
        elif how == "new":
            write(list(range(count, count + size)), rng, how)
        elif how == "maintain":
            bank.maintain(seed)
        elif how == "search_ids":
            asked = rng.choice(count, size, replace=False).tolist()
            found = set(bank.search_ids(np.array(asked), k).ids.tolist())
            parts = [slow.near(half[i], k, name, set(asked)) for name, half in slow.halves.items() for i in asked]
            assert set().union(*(must for must, _ in parts)) <= found <= set().union(*(may for _, may in parts))
        else:
            queries = unit(rng, size, dim)
            for modality, half in slow.halves.items():
                scores, ids = bank.search(queries, k, modality)
                for query, its_scores, its_ids in zip(queries, scores, ids.tolist(), strict=True):
                    must, may = slow.near(query, k, modality, set())
                    assert len(its_ids) == len(set(its_ids)) == k
                    assert must <= set(its_ids) <= may
                    np.testing.assert_allclose(its_scores, [half[i] @ query for i in its_ids], atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_on_both_sides_of_a_chunks_border_are_written_found_and_saved(rng, dtype):
    count = CHUNK_ROWS + 300
    bank = KnowledgeBank(4, count, dtype)
    audio, text = unit(rng, count, 4).astype(dtype), unit(rng, count, 4).astype(dtype)
    bank.upsert(np.arange(count), audio, text, None, step=0)
    across = np.arange(CHUNK_ROWS - 5, CHUNK_ROWS + 5)
    audio[across], text[across] = unit(rng, 10, 4), unit(rng, 10, 4)
    bank.upsert(across, audio[across], text[across], None, step=1)
    state = {name: value.copy() for name, value in bank.state().items()}
    np.testing.assert_array_equal(state["audio"], audio)
    np.testing.assert_array_equal(state["text"], text)
    for value in state.values():
        value.flags.writeable = False  # as a file that is mapped into memory
    for one in (bank, KnowledgeBank.from_state(state, dim=4, capacity=count, dtype=dtype)):
        scores, ids = one.search(audio[across], 3, "audio")
        expected = np.sort(audio[across].astype(np.float32) @ audio.astype(np.float32).T, axis=1)[:, :-4:-1]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert set(across.tolist()) <= set(ids.ravel().tolist())
        knowledge = one.search_ids(across[4:6], 2)
        np.testing.assert_array_equal(knowledge.own_text, text[across[4:6]].astype(np.float16))
        np.testing.assert_array_equal(knowledge.audio, audio[knowledge.ids].astype(np.float16))


def test_inverted_files_come_with_the_rows_and_again_when_recall_falls(rng):
    bank = KnowledgeBank(DIM, 5000, "float32", index="ivf_flat", probes=2, inverted_from=1000, recall=0.9)
    ids, directions = np.arange(4000), unit(rng, 40)

    def write(first: int, last: int, spread: float) -> None:
        rows = unit_rows(directions[ids[first:last] % 40] + spread * rng.normal(size=(last - first, DIM)))
        bank.upsert(ids[first:last], rows, rows[::-1], None, step=0)

    write(0, 900, 0.05)
    assert not bank.maintain()  # too few
    write(900, 1500, 0.05)
    assert bank.maintain()
    assert not bank.maintain()  # nothing has changed
    write(1500, 3500, 0.05)
    assert bank.maintain()  # more than twice as many
    write(0, 3500, 10.0)  # no clusters any more: two lists find little
    assert bank.maintain()
    recalls = [bank.metrics()[f"bank/recall_{name}"] for name in ("audio", "text")]
    assert min(recalls) >= 0.95
    exact = KnowledgeBank.from_state(bank.state(), dim=DIM, capacity=5000, dtype="float32")
    right = set(exact.search_ids(ids[:20], 8).ids.tolist())
    assert len(right & set(bank.search_ids(ids[:20], 8).ids.tolist())) > 0.9 * len(right)


def test_where_every_search_is_exact_there_is_nothing_to_maintain(rng):
    bank, *_ = filled_bank(rng)
    assert not bank.maintain()
    assert (bank.metrics()["bank/recall_audio"], bank.metrics()["bank/inverted_rows"]) == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
def test_searches_and_writes_go_on_while_inverted_files_are_built(kind):
    bank = KnowledgeBank(DIM, 5000, "float32", index=kind, inverted_from=100)
    ids, wrong = np.arange(3000), []

    def rows_of(version: int, chosen: np.ndarray) -> np.ndarray:
        return unit_rows(np.stack([np.cos(chosen * 0.7 + version), np.sin(chosen + version), *[chosen * 0.0] * 14], 1))

    trained = threading.Event()

    def work(seed: int) -> None:
        own, version = np.random.default_rng(seed), 0
        try:
            while version < 20 or not trained.is_set():  # at least as long as it takes to train
                version += 1
                chosen = own.choice(ids, 50, replace=False)
                rows = rows_of(version, chosen)
                bank.upsert(chosen, rows, rows, None, step=version)
                knowledge = bank.search_ids(chosen[:4], 8)
                if not np.allclose(knowledge.audio, knowledge.text):
                    wrong.append(knowledge)
        except Exception as error:
            wrong.append(error)

    bank.upsert(ids, rows_of(0, ids), rows_of(0, ids), None, step=0)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    assert bank.maintain()
    trained.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    bank.maintain()
    state = bank.state()
    exact = KnowledgeBank.from_state(state, dim=DIM, capacity=5000, dtype="float32")
    near = 1e-2 if kind == "ivf_pq" else 1e-4  # codes tell rows this near to each other apart less well
    for modality in ("audio", "text"):
        scores, _ = bank.search(state[modality][:50], 1, modality)
        np.testing.assert_allclose(scores, exact.search(state[modality][:50], 1, modality)[0], atol=near)


def test_a_text_alone_is_found_by_text_and_never_by_audio(rng):
    bank, ids, audio, _ = filled_bank(rng)
    alone = np.arange(6000, 6200)
    bank.upsert(alone, np.zeros((200, DIM)), unit(rng, 200), None, step=0)
    whole = bank.snapshot()
    chosen = ids[:20]
    by_text = neighbours_by_sorting(whole.ids, whole.text, whole.text, set(chosen.tolist()), 4)
    by_audio = neighbours_by_sorting(ids, audio, audio, set(chosen.tolist()), 4)
    found = bank.search_ids(chosen, 4)
    assert set(found.ids.tolist()) == by_text | by_audio
    assert set(found.ids.tolist()) & set(alone.tolist())
    given = np.isin(found.ids, alone)
    np.testing.assert_array_equal(found.audio[given], 0)
    assert (np.abs(found.audio[~given]).sum(axis=1) > 0).all()
    scores, nearest = bank.search(audio[:3], 500, "audio")
    assert set(nearest[0, :300].tolist()) == set(ids.tolist())
    assert np.isneginf(scores[:, 300:]).all()
    assert (np.diff(scores[:, :300], axis=1) <= 0).all()
    again = KnowledgeBank.from_state(bank.state(), dim=DIM, capacity=1000)
    assert set(again.search_ids(chosen, 4).ids.tolist()) <= by_text | by_audio
    assert set(bank.search_ids(alone[:5], 3).ids.tolist()) == neighbours_by_sorting(
        whole.ids, whole.text, whole.text, set(alone[:5].tolist()), 3
    )
