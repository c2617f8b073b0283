"""A worker's link to the bank and the refiner, in torch's terms."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from ask_dist.bank.client import BankClient
from ask_dist.bank.service import BankService
from ask_dist.bank.shard import OwnRows, stacked, whole_metrics
from ask_dist.cluster import BANK, Actors
from ask_dist.config import Config
from ask_dist.data.places import one_line
from ask_dist.errors import InputError
from ask_dist.losses.injection import Neighbours
from ask_dist.losses.reliability import UNKNOWN
from ask_dist.train import checkpoint

MINIMUM_ANSWERS = 50
REFINER_SECONDS = 60.0
HUNG_SECONDS = 10.0
SAVE_SECONDS = 60.0  # between two looks at whether a bank that is saved or put back is alive
PUT_SECONDS = 60.0  # a bank that died is back within seconds, with rows of its own within some more

log = logging.getLogger(__name__)


class KnowledgeSource:
    """Neighbours for the next batch, rows for the bank, and what both actors say of themselves.

    Nothing that a step calls waits for an actor, unless the run is deterministic. Then everything waits, and ranks
    write one after the other: what the bank holds and answers is a function of the step.

    Args:
        config: the run.
        actors: the run's; it has a bank.
        device: where the embeddings are.
        rank: of this worker; ranks are spread over the bank's read replicas by it.
        world_size: workers in all.
    """

    def __init__(
        self, config: Config, actors: Actors, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        self._config, self._actors, self._device = config, actors, device
        self._rank, self._world_size = rank, world_size
        self._deterministic = config.optimization.deterministic
        self._bank = BankService(actors.bank, rank)
        self._client = BankClient(
            self._bank, max_in_flight=config.bank.max_in_flight, deterministic=self._deterministic
        )
        self._start = config.knowledge.asked_from
        self._asked = self._missed = 0
        self._polls: dict[Any, Any] = {}
        self._said: dict[Any, dict[str, float]] = {}  # the last metrics of each actor
        self._told: list[str] = []

    def exchange(self, ids: Tensor, following: Tensor, step: int, total_steps: int) -> Neighbours | None:
        """What the bank answers for the ids of this step, asked for one step before; asks for those that follow.

        A deterministic run asks now, and waits: its first step after a resume then has neighbours as any other.

        Raises:
            InputError: as `collect`.
            RuntimeError: the run is deterministic and the bank did not answer.
        """
        if not self._deterministic:
            neighbours = self.collect()
            self.prefetch(following, (step + 1) / total_steps)
            return neighbours
        self.prefetch(ids, step / total_steps)
        asked, neighbours = self._asked > 0, self.collect()
        if asked and neighbours is None:
            raise RuntimeError("the bank did not answer, and a deterministic run can't go on without it; --resume")
        return neighbours

    def prefetch(self, ids: Tensor, progress: float) -> None:
        """Asks for the neighbours of the next batch, once any gate is open by then."""
        if progress >= self._start:
            self._client.prefetch(ids.cpu().numpy())
            self._asked += 1

    def collect(self) -> Neighbours | None:
        """What the bank answered to `prefetch`; None: a plain step.

        Raises:
            InputError: more answers were late or failed than `bank.max_late_share` or `bank.max_missed` allows.
        """
        answer = self._client.collect()
        if answer is None:
            self._missed += self._asked > 0  # before the first prefetch there is nothing to miss
            self._check_missed()
            return None
        self._missed = 0
        return Neighbours.of(answer, self._client.prototypes, self._device)

    def upsert(self, ids: Tensor, audio: Tensor, text: Tensor, reliability: Tensor, global_step: int) -> None:
        """Sends the rows that this step encoded: int64 [n], float [n, dim] twice, float [n]. A collective."""
        rows = (tensor.detach().float().cpu().numpy() for tensor in (audio, text, reliability))
        for _ in self._turns():
            self._client.upsert(ids.cpu().numpy(), *rows, global_step)

    def put(self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray, global_step: int) -> None:
        """Rows of unknown reliability, as `upsert`, and waits until the bank has them. A collective.

        Raises:
            InputError: the bank has no room for them.
            RayActorError: the bank died meanwhile; other shards of it may have their rows.
            GetTimeoutError: the bank said nothing for `PUT_SECONDS`, in a run that is not deterministic. It takes the
                rows once it can.
        """
        limit = None if self._deterministic else PUT_SECONDS
        for _ in self._turns():
            for call in self._bank.upsert(ids, audio, text, np.full(len(ids), UNKNOWN, np.float32), global_step):
                answer(call, limit)

    def begin(self) -> None:
        """Lets the refiner note the bank as it is: what it carries external rows on from."""
        if self._actors.refiner is not None:
            ray.get(self._actors.refiner.begin.remote())

    def refine(self) -> None:
        """In a deterministic run the refiner's next generation; otherwise it has its own clock. A collective."""
        if not self._deterministic or self._actors.refiner is None:
            return
        if self._rank == 0:
            ray.get(self._actors.refiner.refine.remote())
        if self._world_size > 1:
            dist.barrier()

    def metrics(self) -> dict[str, float]:
        """The client's counts, and the last metrics that the actors gave; asks them anew without waiting."""
        for actor in self._actors.all:
            request = self._polls.get(actor)
            if request is not None and ray.wait([request], timeout=0)[0]:
                self._said[actor] = _answer(request) or self._said.get(actor, {})
                request = None
            self._polls[actor] = actor.metrics.remote() if request is None else request
        return self._whole_metrics(self._said)

    def take_problem(self) -> str | None:
        """What is to be told of the refiner or of the bank's folder, as they last said of themselves.

        One at a time, and each once; of a folder that could be written again meanwhile, once more.
        """
        said, problems = self._whole_metrics(self._said), []
        if said.get("refine/given_up"):
            problems.append(
                "the refiner gave up, since its generations failed one after the other: rows of the bank fade from now "
                "on; the log of its actor, in Ray's session folder, says why, and --resume starts another"
            )
        if said.get("bank/durable") == 0:
            problems.append(
                f"{self._config.run_dir / BANK} can't be written: the bank goes on in memory alone, and a crash of it "
                "would lose what was written since; free space there, and all is kept again within a minute or two; "
                "the log of the bank's actor, in Ray's session folder, names the error"
            )
        untold = [problem for problem in problems if problem not in self._told]
        self._told = [problem for problem in problems if problem not in untold[1:]]
        return untold[0] if untold else None

    def last_metrics(self) -> dict[str, float]:
        """As `metrics`, but waits for what the actors say now; of one that is dead or hangs, what it said last."""
        calls = {actor: actor.metrics.remote() for actor in self._actors.all}
        said = {actor: _answer(call, HUNG_SECONDS) or self._said.get(actor, {}) for actor, call in calls.items()}
        return self._whole_metrics(said)

    def stored_rows(self, ids: np.ndarray) -> OwnRows | None:
        """What the bank holds of these ids (int64 [n]); waits for it. None where it died or hangs."""
        try:
            return stacked(ray.get(self._bank.own_rows(ids), timeout=PUT_SECONDS))
        except ray.exceptions.RayError as error:
            log.warning("the bank does not say what it holds: %s", one_line(error))
            return None

    def _turns(self) -> Iterator[None]:
        """This rank's turn to write: once, at once; in a deterministic run when the ranks before it have had theirs.

        The order of rows in the bank decides between equals in a search, and what k-means begins with.
        """
        if not self._deterministic or self._world_size == 1:
            yield
            return
        for rank in range(self._world_size):
            if rank == self._rank:
                yield
            dist.barrier()

    def _whole_metrics(self, said: dict[Any, dict[str, float]]) -> dict[str, float]:
        bank = whole_metrics([[said.get(actor, {}) for actor in shard] for shard in self._actors.bank])
        return bank | said.get(self._actors.refiner, {}) | self._client.metrics()

    def _check_missed(self) -> None:
        if self._missed >= self._config.bank.max_missed:
            raise InputError(
                f"{self._missed} of the bank's answers in a row came late or failed, bank.max_missed allows no more; "
                "give it cores of its own (cluster.bank_cpus), see ray status for actors that did not start, or raise "
                "the limit"
            )
        share, limit = self._client.metrics()["bank/late_share"], self._config.bank.max_late_share
        if self._asked >= MINIMUM_ANSWERS and share > limit:
            raise InputError(
                f"{share:.0%} of the bank's answers came late, bank.max_late_share allows {limit:.0%}; "
                "give it cores of its own (cluster.bank_cpus), lower knowledge.neighbours, or raise the limit"
            )


def save_bank(primary: Any, folder: Path) -> str:
    """Has a shard of the bank write its snapshot; gives its digest. One that is being restarted is waited for.

    Raises:
        GetTimeoutError: the bank is alive and says nothing. It may still write into the folder, later.
    """
    call = primary.save.remote(str(folder))
    while True:
        try:
            return answer(call, SAVE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            if _says_nothing(primary, SAVE_SECONDS):
                raise


def load_actors(actors: Actors, folder: Path | None) -> None:
    """Puts the actors back to a verified checkpoint, or empties them.

    A bank that was saved in another number of shards is split anew; the refiner then begins anew.
    """
    banks, shards = [] if folder is None else checkpoint.bank_folders(folder), len(actors.bank)
    if actors.refiner is not None:  # a generation that workers who died had asked for must not meet the new bank
        _put_back(actors.refiner, {})
    calls = {primary: primary.load.remote(banks, shard, shards) for shard, (primary, *_) in enumerate(actors.bank)}
    for primary, call in calls.items():
        _loaded(primary, call)
    if actors.refiner is not None:  # by its clock it has gone on with the old bank until now
        fits = folder is not None and len(banks) == shards
        _put_back(actors.refiner, checkpoint.load_arrays(folder, "refiner") if folder is not None and fits else {})


def _loaded(primary: Any, call: Any) -> None:
    """Waits for a shard to be put back. One that hangs is ended; started again by Ray, it takes the same call."""
    while True:
        try:
            return answer(call, SAVE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            if _says_nothing(primary, SAVE_SECONDS):
                log.warning("the bank hangs: it is ended, and begins anew from the checkpoint")
                ray.kill(primary, no_restart=False)


def refiner_state(refiner: Any, deterministic: bool = False) -> dict[str, np.ndarray]:
    """What the refiner has learned, for a checkpoint; a generation in progress is waited for.

    Nothing where it is dead, or says nothing for `REFINER_SECONDS` in a run that is not deterministic: from such a
    checkpoint on it begins anew.
    """
    try:
        return answer(refiner.state.remote(), None if deterministic else REFINER_SECONDS)
    except ray.exceptions.RayError as error:
        if deterministic:
            raise
        log.warning("a checkpoint without what the refiner has learned: %s", one_line(error))
        _end_if_hung(refiner)
        return {}


def _put_back(refiner: Any, state: dict[str, np.ndarray]) -> None:
    """Has the refiner go on from a state, after the generation in progress; one that is started again begins anew."""
    call = refiner.load_state.remote(state)
    while True:
        try:
            return answer(call, REFINER_SECONDS)
        except ray.exceptions.GetTimeoutError:
            if _end_if_hung(refiner):
                return
        except ray.exceptions.RayActorError as error:
            log.warning("the refiner begins anew: %s", one_line(error))
            return


def _end_if_hung(refiner: Any) -> bool:
    """Whether the refiner was alive and said nothing at all, and was ended, so that Ray starts it again."""
    hangs = _says_nothing(refiner, HUNG_SECONDS)  # its metrics it tells beside a generation
    if hangs:
        log.warning("the refiner hangs: it is ended, and begins anew")
        ray.kill(refiner, no_restart=False)
    return hangs


def _says_nothing(actor: Any, seconds: float) -> bool:
    """Whether an actor is alive and does not even tell its metrics within so many seconds."""
    try:
        ray.get(actor.metrics.remote(), timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        return True
    except ray.exceptions.RayError:
        pass
    return False


def answer(call: Any, seconds: float | None = None) -> Any:
    """What an actor answers, within so many seconds or whenever it does; an InputError there, or when Ray started the
    actor, is one here."""
    try:
        return ray.get(call, timeout=seconds)
    except ray.exceptions.RayActorError as error:
        _, raised, line = str(error).rpartition("InputError: ")  # Ray has it as text alone
        if error.actor_init_failed and raised:
            raise InputError(line) from None
        raise
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def _answer(request: Any, seconds: float | None = None) -> dict[str, float]:
    try:
        return ray.get(request, timeout=seconds)
    except ray.exceptions.RayError:
        return {}  # an actor that is being restarted says nothing this time
