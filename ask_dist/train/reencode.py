"""The refinement without an error of its own: a corpus is encoded again by the present weights, in the workers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from ray.exceptions import GetTimeoutError, RayActorError

from ask_dist.config import Config
from ask_dist.data.leaks import HeldOut
from ask_dist.data.places import one_line
from ask_dist.data.quarantine import BadSamples
from ask_dist.data.shards import ShardList
from ask_dist.evaluate.encode import caption_rows, encode, paired_rows
from ask_dist.evaluate.external import load_corpus
from ask_dist.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from ask_dist.train.knowledge import KnowledgeSource
    from ask_dist.train.state import TrainState

PART = 1024  # clips or captions that a worker holds at a time

log = logging.getLogger(__name__)


def is_due(config: Config, step: int, every: int, total_steps: int) -> bool:
    """Whether the corpus is encoded after so many global steps: each `every`, from the last time before the bank is
    first asked. What was encoded before that time would be written over unseen."""
    reaches = (step + every) / total_steps  # of the step that this time's rows are the last to be asked for
    return config.refine.strategy == "reencode" and step % every == 0 and reaches >= config.knowledge.asked_from


def reencode(state: TrainState) -> None:
    """Encodes `refine.corpus`, or else the training clips, each worker its share, and writes the rows to the bank.

    They are rows of this global step; where the bank has got a later one meanwhile, that one stays. Training waits. A
    collective.

    Raises:
        InputError: the corpus can't be had any more, or the bank has no room for it.
        RayActorError: the bank died, and the run is deterministic.
    """
    if state.knowledge is None:
        return
    place, step = state.config.refine.corpus, state.engine.global_step
    corpus = state.shards["train"] if place is None else load_corpus(place, state.config)
    model = state.engine.whole()
    parts = share_of(corpus, model, state.config, state.rank, state.world_size, state.held_out, state.loader.bad)
    put_parts(state.knowledge, parts, step, deterministic=state.config.optimization.deterministic)


def put_parts(
    knowledge: KnowledgeSource, parts: Iterable[tuple[np.ndarray, ...]], step: int, *, deterministic: bool
) -> None:
    """Writes the parts of `share_of` to the bank, as rows of this global step.

    A bank that dies costs the parts that it is sent until it is back, and what it held if it is not durable, up to the
    next time; one that is silent for `PUT_SECONDS` all further parts.

    Raises:
        InputError: the bank has no room for them.
        RayActorError: the bank died, and the run is deterministic.
    """
    for rows in parts:
        try:
            knowledge.put(*rows, global_step=step)
        except (RayActorError, GetTimeoutError) as error:
            if deterministic:
                raise
            log.warning("the bank did not take %d rows, which stay as they are: %s", len(rows[0]), one_line(error))
            if isinstance(error, GetTimeoutError):
                return


def share_of(
    corpus: ShardList | list[str],
    model: DualEncoder,
    config: Config,
    rank: int,
    world_size: int,
    held_out: HeldOut,
    bad: BadSamples,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Part by part, as many on every rank, what this rank encodes: ids int64 [n], audio and text float32 [n, dim].

    What is held out is left out; so are clips that can't be read, whose rows in the bank stay as they are. Such clips
    are named in `bad`.
    """
    size = len(corpus) if isinstance(corpus, list) else corpus.clips
    parts = max(1, -(-size // (PART * world_size)))
    for part in range(rank, parts * world_size, world_size):
        if isinstance(corpus, list):
            texts = corpus[part * size // (parts * world_size) : (part + 1) * size // (parts * world_size)]
            allowed = [text for text in texts if not held_out.has_caption(text)]
            yield caption_rows(model, allowed, config.model.embedding_dim)
            continue
        encoded = encode(model, corpus, config, part, parts * world_size, held_out=held_out)
        bad.note(0, [], encoded.bad)
        if encoded.bad:
            log.warning("clips that can't be used, the first: %s; their rows stay as they are", encoded.bad[0])
        yield paired_rows(encoded)
