"""A bank under load as a set of queues, in plain arithmetic.

Rows are split over S shards, each of which R actors serve: a primary, which takes the writes, and replicas, which
follow it. An actor has one lock and so one queue. In a step of T seconds each of W workers sends one search of m ids,
which visits one actor of every shard (three times, if there are several), and one upsert of m rows, to the primaries of
the shards that own them. So a primary, the busiest of its shard, sees W/(R T) searches a second, of s seconds, and W/T
upserts, of u seconds; once a generation the refiner holds its lock, for h seconds in G. Each replica asks it every F
seconds, at most, what was written: a call in which it looks through all of its rows, of l seconds.

    busy = W s / (R T) + W u / T + h / G + (R - 1) l / F

With `refine.strategy=reencode` training stops every so many steps, and the workers encode all N rows, each clip in a
share e of what it takes in a step. Nobody searches then, and at worst they wait for every row that a primary writes, in
calls of c seconds with P rows over all shards, so the pass takes

    N e T / (W m) + N v / S + N c / P,    with v the seconds of a row's write.

Two ways of arriving bound the wait, and the later answer of the two counts:

- Workers out of step: Poisson arrivals, M/G/1. The mean wait is Pollaczek and Khinchine's,
  w = sum(rate seconds^2) / (2 (1 - busy)) (Kleinrock, Queueing Systems I, 1975, chapter 5), its tail that of Kingman's
  heavy-traffic limit, P(wait > t) = busy exp(-busy t / w), exact for M/M/1 (Kleinrock II, 1976, chapter 2). An answer
  is as late as the slowest of its S shards at each of its V visits; an upper bound takes each of the S V waits to be
  independent and to have a Vth of the time.
- Workers in lockstep, as a gradient's all-reduce makes them: all of a step's calls arrive at once, and a primary takes
  W u + (W / R) s seconds until the last search is answered, and longer by what its replicas ask meanwhile.

An answer is late if it is not there when its step begins, T after it was asked for. While the refiner holds the lock,
nobody is answered: a hold that is longer than what is left of a step makes answers late too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

from ask_dist.plan.constants import Constants, Precision

MOST_BUSY = 0.8  # of a queue or a network card: beyond it the wait grows faster than any estimate of it is good
MOST_LATE = 0.01
MOST_SENDING = 0.1  # of a step, on the worker: what knowledge may cost a step at all
QUANTILE = 0.99
SHARDS = tuple(2**power for power in range(11))
REPLICAS = tuple(2**power for power in range(9))
ROW_EXTRA = 20  # bytes of id, age and reliability that travel with a row
SCORE_BYTES = 12  # of a neighbour that a shard offers: score and id
VISITS = 3  # own rows, nearest, chosen: see ask_dist/bank/shard.py
# Bytes of the refiner: of its process to work with, and of a row's snapshot, commit and source beside their values.
REFINER, SNAPSHOT_EXTRA, COMMIT_EXTRA, SOURCE_EXTRA = 300 * 2**20, 36, 16, 16
FOLLOW_SECONDS = 0.5  # between two times that a replica asks its primary: see ask_dist/bank/actor.py
PART = 1024  # rows that a worker encodes again and then writes: see ask_dist/train/reencode.py


@dataclass(frozen=True)
class Load:
    """What training asks of the bank.

    Attributes:
        workers, rows, step_seconds: training workers, rows of the whole bank, and a step without waiting.
        batch: ids a search and rows an upsert. dim: values of an embedding. neighbours: k, by each modality.
        precision: of the bank's rows. threads: of one search; it is taken to be as much faster.
        strategy, interval, cpu_share: of the refiner, as configured; "none" for no refiner.
        every: epochs between two passes of the strategy "reencode", as configured. clips: of an epoch.
    """

    workers: int
    rows: int
    step_seconds: float
    batch: int
    dim: int
    neighbours: int
    precision: Precision
    threads: int
    strategy: str
    interval: float
    cpu_share: float
    every: float
    clips: int

    @property
    def epoch_seconds(self) -> float:
        """Until training itself has renewed every row, if it visits all of them."""
        return self.rows / (self.workers * self.batch) * self.step_seconds

    @property
    def steps_between(self) -> float:
        """Steps between two passes of the strategy "reencode"."""
        return max(1.0, self.every * self.clips / (self.workers * self.batch))


@dataclass(frozen=True)
class Node:
    """Where one actor runs: bytes of memory, bytes a second of network each way, and whether it searches on a GPU."""

    memory: float
    network: float
    gpu: bool = False


@dataclass(frozen=True)
class Layout:
    """An index over shards, each of `replicas` actors, its primary among them."""

    index: str
    shards: int
    replicas: int

    @property
    def actors(self) -> int:
        return self.shards * self.replicas


@dataclass(frozen=True)
class Work:
    """Seconds and bytes of one worker's step at one primary.

    Attributes:
        search, upsert: seconds that a search, in all its visits, and an upsert keep it busy.
        visits: of a search to each shard, one after the other.
        answer, exchanged, rows_sent: bytes of its part of an answer, of what it is told by the other shards for that,
            and of the upsert's rows.
        calls: that the worker sends, to all shards.
        look: seconds that a replica which asks what was written keeps it busy.
        hold, generation: seconds that the refiner holds the lock, and between two such times.
        reencoding: seconds of a pass in which the workers encode all rows again; 0 with other strategies.
    """

    search: float
    upsert: float
    visits: int
    calls: float
    answer: float
    exchanged: float
    rows_sent: float
    look: float
    hold: float
    generation: float
    reencoding: float


@dataclass(frozen=True)
class Outcome:
    """What a layout does under a load. Times in seconds from asking to having the answer, memory in bytes, networks in
    bytes a second.

    Attributes:
        busy: share of time that a primary works; `busy_with` is what most of it goes to.
        answer_mean, answer_p99: workers out of step. lockstep_p99: workers in step.
        late_share: of the answers, in the worse case of the two.
        sending: share of a step that a worker spends on sending its calls.
        memory_shard, memory_all: of one actor and of all.
        network_bank: of a primary, in and out together. network_worker: of a worker, the greater of the two.
        network_all: what travels in all.
        memory_refiner, network_refiner: of the refiner, wherever it runs; not among what must hold.
        generation: seconds between two corrections of a row, by the refiner or by a pass of "reencode".
        reencoding: seconds of such a pass, in which training waits. step_seconds: of a step, these passes included.
        strain: what it uses of the limit that it is nearest to, or furthest beyond.
        problems: why it does not hold; empty if it does.
    """

    layout: Layout
    busy: float
    busy_with: Literal["searches", "upserts", "the refiner", "its replicas"]
    answer_mean: float
    answer_p99: float
    lockstep_p99: float
    late_share: float
    sending: float
    memory_shard: float
    memory_all: float
    network_bank: float
    network_worker: float
    network_all: float
    memory_refiner: float
    network_refiner: float
    generation: float
    reencoding: float
    step_seconds: float
    strain: float = 0.0
    problems: tuple[str, ...] = ()


def work(load: Load, layout: Layout, constants: Constants, gpu: bool = False) -> Work:
    """What one worker's step costs at one primary."""
    shards, index = layout.shards, layout.index
    rows, scale, width = load.rows / shards, load.dim / constants.dim, 4 * load.dim + ROW_EXTRA
    queries = 2 * load.batch
    found = min(queries * load.neighbours, load.rows)
    answer = (found + load.batch) / shards * width
    visits, exchanged = (1, 0.0) if shards == 1 else (VISITS, load.batch * width + shards * found * SCORE_BYTES)
    own = load.batch / shards
    touched = 1.0 - (1.0 - 1.0 / shards) ** load.batch  # chance that a shard owns any row of a batch
    followed = (layout.replicas - 1) * constants.snapshot  # each replica is given a copy of what was written
    written = (constants.upsert[index] + followed) * scale
    hold, generation, reencoding = 0.0, math.inf, 0.0
    if load.strategy == "reencode":  # the refiner makes prototypes and corrects nothing
        hold = rows * constants.snapshot * scale
        encoded = constants.encoding * load.step_seconds * load.rows / (load.workers * load.batch)
        reencoding = encoded + rows * written + load.rows / PART * constants.call
    elif load.strategy != "none":
        hold = rows * (constants.snapshot + constants.commit) * scale
    if load.strategy != "none":
        taken = constants.generation_seconds(load.strategy, load.rows, load.dim)
        generation = max(hold, load.interval, taken / load.cpu_share)
    return Work(
        search=visits * constants.call
        + queries * constants.query_seconds(index, rows, load.dim, gpu) / load.threads
        + (answer + exchanged / shards) * constants.byte,
        upsert=touched * constants.call + own * written,
        visits=visits,
        calls=shards * (visits + touched),
        answer=answer,
        exchanged=exchanged,
        rows_sent=own * width,
        look=constants.call + constants.look.at(rows),
        hold=hold,
        generation=generation,
        reencoding=reencoding,
    )


def mean_wait(rates_and_seconds: list[tuple[float, float]], busy: float) -> float:
    """Pollaczek and Khinchine's mean wait for classes of calls (a second, seconds each) at one server."""
    return math.inf if busy >= 1.0 else sum(rate * each**2 for rate, each in rates_and_seconds) / (2.0 * (1.0 - busy))


def tail(busy: float, wait: float, seconds: float) -> float:
    """P(wait > seconds) at a server whose mean wait is `wait`."""
    if busy >= 1.0 or seconds < 0.0:
        return 1.0
    return busy * math.exp(-busy * seconds / wait) if wait else 0.0


def wait_quantile(busy: float, wait: float, quantile: float, servers: int = 1) -> float:
    """The wait that the slowest of independent servers exceeds with probability 1 - quantile."""
    if busy >= 1.0:
        return math.inf
    one = 1.0 - quantile ** (1.0 / servers)
    return wait / busy * math.log(busy / one) if busy > one else 0.0


def refiner(load: Load, shards: int, generation: float) -> tuple[float, float]:
    """Bytes of memory, and a second of network, of the refiner: it keeps a source of every row, and holds one shard's
    snapshot, the half of a new source and its commit, in float16."""
    if load.strategy == "none":
        return 0.0, 0.0
    corrects = load.strategy != "reencode"
    row, source = 4 * load.dim, 2 * load.dim + SOURCE_EXTRA
    snapshot, commit = row + SNAPSHOT_EXTRA, corrects * (row + COMMIT_EXTRA)
    memory = REFINER + load.rows * 2 * source + load.rows / shards * (snapshot + source + commit)
    return memory, load.rows * (snapshot + commit) / generation


def predict(load: Load, layout: Layout, constants: Constants, node: Node) -> Outcome:
    """Utilisation, waits, memory and network of one layout, and what of it does not hold."""
    part = work(load, layout, constants, node.gpu)
    step, shards = load.step_seconds, layout.shards
    searches, upserts = load.workers / step / layout.replicas, load.workers / step
    looks = (layout.replicas - 1) / FOLLOW_SECONDS
    shares = {
        "searches": searches * part.search,
        "upserts": upserts * part.upsert,
        "the refiner": part.hold / part.generation if part.hold else 0.0,
        "its replicas": looks * part.look,
    }
    busy = sum(shares.values())
    wait = mean_wait([(searches, part.search), (upserts, part.upsert), (looks, part.look)], busy)
    travel = part.visits * constants.round_trip + shards * part.answer / node.network
    allowed = step - travel
    waits = shards * part.visits
    late, lockstep = 1.0, math.inf
    if busy < 1.0:
        free = 1.0 - shares["its replicas"]
        written, burst = load.workers * part.upsert / free, load.workers / layout.replicas * part.search / free
        lockstep, drained = written + QUANTILE * burst, written + burst
        alone = 1.0 - (1.0 - tail(busy, wait, (allowed - part.search) / part.visits)) ** waits
        together = min(1.0, max(0.0, drained - allowed) / burst)
        held = [max(0.0, part.hold + base - allowed) / part.generation for base in (part.search, drained)]
        late = min(1.0, max(alone + held[0], together + held[1]))
    step_in_all = step + part.reencoding / load.steps_between
    memory_refiner, network_refiner = refiner(load, shards, part.generation)
    slowest = part.visits * wait_quantile(busy, wait, QUANTILE, waits)
    outcome = Outcome(
        layout=layout,
        busy=busy,
        busy_with=max(shares, key=shares.__getitem__),  # type: ignore[arg-type]
        answer_mean=part.visits * wait + part.search + travel,
        answer_p99=slowest + part.search + travel,
        lockstep_p99=lockstep + travel,
        late_share=late,
        sending=part.calls * constants.submit / step,
        memory_shard=load.rows / shards * constants.bytes_a_row(layout.index, load.precision, load.dim),
        memory_all=load.rows * layout.replicas * constants.bytes_a_row(layout.index, load.precision, load.dim),
        network_bank=searches * (part.answer + part.exchanged)
        + upserts * layout.replicas * part.rows_sent
        + network_refiner / shards,
        network_worker=shards * max(part.answer, part.rows_sent) / step,
        network_all=load.workers / step * shards * (part.answer + part.exchanged + layout.replicas * part.rows_sent)
        + network_refiner,
        memory_refiner=memory_refiner,
        network_refiner=network_refiner,
        generation=load.steps_between * step_in_all if part.reencoding else part.generation,
        reencoding=part.reencoding,
        step_seconds=step_in_all,
    )
    strains = _strains(outcome, node)
    problems = tuple(told for told, strain in strains.items() if strain > 1.0)
    return replace(outcome, strain=max(strains.values()), problems=problems)


def _strains(outcome: Outcome, node: Node) -> dict[str, float]:
    """What a layout uses of each limit, by what is to be said if that is more than all of it."""
    shard, room = outcome.memory_shard, node.memory
    used = {
        f"memory: {shard / 2**30:.0f} GiB a shard, a node has {room / 2**30:.0f}": shard / room,
        f"busy: {outcome.busy:.2f}, most with {outcome.busy_with}": outcome.busy / MOST_BUSY,
        f"late: {outcome.late_share:.1%} of the answers": outcome.late_share / MOST_LATE,
        f"sending: {outcome.sending:.0%} of a worker's step": outcome.sending / MOST_SENDING,
    }
    for name, network in (("bank", outcome.network_bank), ("worker", outcome.network_worker)):
        told = f"network of a {name}: {network / 1e9:.2f} GB/s of {node.network / 1e9:.2f}"
        used[told] = network / node.network / MOST_BUSY
    return used


def smallest(load: Load, index: str, constants: Constants, node: Node) -> Outcome:
    """The layout of an index with the fewest actors that holds, with few shards rather than few replicas; where none
    does, the one that is least beyond a limit."""
    outcomes = [
        predict(load, Layout(index, shards, replicas), constants, node)
        for shards, replicas in itertools.product(SHARDS, REPLICAS)
    ]
    holding = [outcome for outcome in outcomes if not outcome.problems]
    if holding:
        return min(holding, key=lambda outcome: (outcome.layout.actors, outcome.layout.shards))
    return min(outcomes, key=lambda outcome: outcome.strain)


def recommend(load: Load, constants: Constants, node: Node) -> Outcome:
    """The smallest layout over all kinds of index that were measured; of equally small ones the more exact."""
    found = [smallest(load, index, constants, node) for index in constants.indexes(node.gpu)]
    return min(found, key=lambda outcome: (outcome.strain if outcome.problems else 0.0, outcome.layout.actors))


def breaking_point(
    load: Load, layout: Layout, constants: Constants, node: Node, grown: Literal["workers", "rows"]
) -> tuple[int, str]:
    """The largest number of workers, or of rows, within one percent, that a layout holds, and what then breaks."""
    holds, breaks = getattr(load, grown), 0
    if predict(load, layout, constants, node).problems:
        holds, breaks = 0, holds
    problem = ""
    while breaks == 0 or breaks - holds > max(1, holds // 100):
        tried = 2 * holds if breaks == 0 else (holds + breaks) // 2
        changed = replace(load, workers=tried) if grown == "workers" else replace(load, rows=tried)
        problems = predict(changed, layout, constants, node).problems
        if problems:
            breaks, problem = tried, problems[0]
        else:
            holds = tried
    return holds, problem
