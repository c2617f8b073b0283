"""What a worker's loop holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ask_dist.cluster import Actors
from ask_dist.config import Config
from ask_dist.data.leaks import HeldOut
from ask_dist.data.loader import TrainLoader
from ask_dist.data.shards import ShardList
from ask_dist.losses.objective import AskObjective
from ask_dist.train.embeddings import Embeddings
from ask_dist.train.engine import Engine
from ask_dist.train.knowledge import KnowledgeSource
from ask_dist.train.tracking import AuditLog, MetricsLog, StageClock


@dataclass
class TrainState:
    """All that a worker's loop holds."""

    config: Config
    rank: int
    world_size: int
    engine: Engine
    objective: AskObjective
    loader: TrainLoader
    shards: dict[str, ShardList]
    held_out: HeldOut
    knowledge: KnowledgeSource | None
    actors: Actors
    total_steps: int
    lineage: str
    log: MetricsLog | None
    audit: AuditLog | None
    clock: StageClock
    embeddings: Embeddings = field(default_factory=Embeddings)
    samples_seen: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    trusted: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """Share of the run that lies behind."""
        return self.engine.global_step / self.total_steps
