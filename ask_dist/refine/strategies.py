"""Ways to carry the drift of re-encoded rows over to the others. One object serves one modality of one bank."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ask_dist.bank.prototypes import unit_rows
from ask_dist.refine.graph import nearest

RIDGE = 0.1
CENTRES = 512  # known rows that the kernel regression is written in
JITTER = 1e-6
BATCH = 256
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-2
CHECK_EVERY = 20  # optimizer steps between looks at the rows held out for early stopping


@dataclass(frozen=True)
class Settings:
    """What the strategies share.

    Attributes:
        neighbours: known rows that a row listens to. hidden: width of the networks. steps: optimizer steps a
        generation. seed: of batches, masks and initial weights. threads: CPU threads of a FAISS search.
    """

    neighbours: int = 16
    hidden: int = 128
    steps: int = 60
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Task:
    """Rows that are known at their source frame and at a later one.

    Attributes:
        known: float32 [m, d], rows that were re-encoded since, as they were at the source frame.
        fresh: float32 [m, d], the same rows as they are now.
    """

    known: np.ndarray
    fresh: np.ndarray


# Other rows at the source frame, float32 [n, d], brought forward: float32 [n, d], unit length.
Move = Callable[[np.ndarray], np.ndarray]


class NoChange:
    """Leaves every row as it is: the baseline, and a way to only measure the drift."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def fit(self, task: Task) -> Move:
        """Learns how the known rows have drifted."""
        return lambda rows: rows

    def state(self) -> dict[str, np.ndarray]:
        """What the next generation starts from."""
        return {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state()`."""


class Linear(NoChange):
    """One ridge regression of the drift on the row: with few known rows it shrinks to their mean drift."""

    def fit(self, task: Task) -> Move:
        move = linear_map(task)
        return lambda rows: unit_rows(move(rows))


class KnnMean(NoChange):
    """The linear map, then the mean of what it left over at the nearest known rows."""

    def fit(self, task: Task) -> Move:
        move = linear_map(task)
        left = task.fresh - move(task.known)

        def moved(rows: np.ndarray) -> np.ndarray:
            near = nearest(rows, task.known, self.settings.neighbours, self.settings.threads)
            return unit_rows(move(rows) + left[near].mean(axis=1))

        return moved


class Kernel(NoChange):
    """The linear map, then a kernel ridge regression (Saunders et al. 1998) of what it leaves, written in some of the
    known rows (the Nyström method; Williams and Seeger 2001).

    A ridge that predicts other known rows best is too high: known rows are those that are trained on, which is noise
    to this regression, while the wanted ones often are not.
    """

    def fit(self, task: Task) -> Move:
        move = linear_map(task)
        order = np.random.default_rng(self.settings.seed).permutation(len(task.known))
        centres = task.known[order[:CENTRES]]
        width = np.median(1.0 - centres @ centres.T) + 1e-6

        def kernel(rows: np.ndarray) -> np.ndarray:
            return np.exp((rows @ centres.T - 1.0) / width)

        among, known = kernel(centres), kernel(task.known)
        # All but singular where rows are near each other: it takes double precision, and a little on the diagonal.
        known = known.astype(np.float64)
        gram = known.T @ known + RIDGE * among + JITTER * np.eye(len(centres))
        weight = np.linalg.solve(gram, known.T @ (task.fresh - move(task.known))).astype(np.float32)
        return lambda rows: unit_rows(move(rows) + kernel(rows) @ weight)


class Mlp(NoChange):
    """The linear map, then a small network of the row for what it leaves; goes on from its last weights."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._net: nn.Module | None = None

    def fit(self, task: Task) -> Move:
        move = linear_map(task)
        scaled = Scaled(task, move)
        net = self._net = self._net or row_network(scaled.dim, self.settings)
        generator = torch.Generator().manual_seed(self.settings.seed)
        fit, held_out = split(len(task.known), generator)

        def loss() -> Tensor:
            batch = fit[torch.randint(len(fit), (min(BATCH, len(fit)),), generator=generator)]
            return nn.functional.mse_loss(net(scaled.known[batch]), scaled.left[batch])

        def check() -> Tensor:
            return nn.functional.mse_loss(net(scaled.known[held_out]), scaled.left[held_out])

        train(net, loss, check, self.settings.steps)

        @torch.no_grad()
        def moved(rows: np.ndarray) -> np.ndarray:
            return unit_rows(move(rows) + scaled.unscale(net(scaled.inputs(rows))))

        return moved

    def state(self) -> dict[str, np.ndarray]:
        return {} if self._net is None else {name: value.numpy() for name, value in self._net.state_dict().items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        if state:
            dim = state["0.weight"].shape[1]
            self._net = row_network(dim, self.settings)
            self._net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})


class Scaled:
    """A task in units that suit a network: inputs and what the linear map leaves, each with a spread of 1."""

    def __init__(self, task: Task, move: Move) -> None:
        left = torch.from_numpy(task.fresh - move(task.known))
        self.dim = left.shape[1]
        self._input_scale = float(task.known.std()) + 1e-12
        self._left_scale = left.std() + 1e-12
        self.known, self.left = self.inputs(task.known), left / self._left_scale

    def inputs(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows) / self._input_scale

    def unscale(self, left: Tensor) -> np.ndarray:
        return (left * self._left_scale).numpy()


def linear_map(task: Task) -> Move:
    """x -> x + mean drift + (x - mean x) W, with W = (X'X + ridge)^-1 X'D of the centred rows X and drifts D = Y - X.

    The mean is free of the ridge: all rows share a good part of a drift, and a penalty on it costs more than it saves.
    """
    known = task.known.astype(np.float64)
    drift = task.fresh - known
    mean, mean_drift = known.mean(axis=0), drift.mean(axis=0)
    centred = known - mean
    gram = centred.T @ centred + RIDGE * np.eye(known.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (drift - mean_drift))
    shift = (mean_drift - mean @ weight).astype(np.float32)
    weight = weight.astype(np.float32)
    return lambda rows: rows + rows @ weight + shift


def row_network(dim: int, settings: Settings) -> nn.Sequential:
    """A network of one row [n, dim] -> [n, dim] that starts as zero."""
    torch.manual_seed(settings.seed)
    net = nn.Sequential(
        nn.Linear(dim, settings.hidden),
        nn.GELU(),
        nn.Linear(settings.hidden, settings.hidden),
        nn.GELU(),
        nn.Linear(settings.hidden, dim),
    )
    zero(net[-1])
    return net


def zero(layer: nn.Module) -> None:
    """Let a linear layer start as zero, so that training starts from what the rest predicts."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def split(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions to fit on (four fifths) and to stop early by (one fifth)."""
    order = torch.randperm(rows, generator=generator)
    return order[rows // 5 :], order[: rows // 5]


def train(net: nn.Module, loss: Callable[[], Tensor], check: Callable[[], Tensor], steps: int) -> None:
    """AdamW with a cosine schedule; the net ends with the weights, the first included, that did best in `check`."""
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_weights = float("inf"), deepcopy(net.state_dict())
    for step in range(steps + 1):
        if step % CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                held_out = float(check())
            if held_out < best:
                best, best_weights = held_out, deepcopy(net.state_dict())
        if step < steps:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            schedule.step()
    net.load_state_dict(best_weights)
