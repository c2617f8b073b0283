"""The graph network. The only module that imports torch-geometric.

Attention over the graph alone stays below a plain network of the row. So the row's own network comes first, and the
graph adds what that network leaves over at the known neighbours: half their mean to begin with, and a GraphSAGE layer
(Hamilton et al. 2017) that learns what to make of the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv
from torch_geometric.utils import scatter

from ask_dist.bank.prototypes import unit_rows
from ask_dist.refine.graph import edges, nearest, nearest_others
from ask_dist.refine.strategies import (
    BATCH,
    Move,
    NoChange,
    Scaled,
    Settings,
    Task,
    linear_map,
    row_network,
    split,
    train,
    zero,
)


class DriftNetwork(nn.Module):
    """What the linear map leaves at a row, from the row and from its known neighbours.

    Args:
        dim: width of a row.
        settings: `hidden` is the width of every hidden layer.
    """

    def __init__(self, dim: int, settings: Settings) -> None:
        super().__init__()
        self.row = row_network(dim, settings)
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.source = nn.Linear(2 * dim + 1, settings.hidden)
        self.listen = SAGEConv((settings.hidden, dim), settings.hidden)
        self.out = nn.Linear(settings.hidden, dim)
        zero(self.out)

    def forward(self, sources: Tensor, left: Tensor, known: Tensor, targets: Tensor, edge_index: Tensor) -> Tensor:
        """Predictions [n, dim] for the targets.

        Args:
            sources: [m, dim] neighbours' rows. left: [m, dim] what the linear map left there. known: [m, 1] 1 where
                `left` may be looked at, else 0. targets: [n, dim]. edge_index: int64 [2, e], source to target.
        """
        surprise = (left - self.row(sources).detach()) * known
        total = scatter(surprise[edge_index[0]], edge_index[1], dim_size=len(targets), reduce="sum")
        count = scatter(known[edge_index[0]], edge_index[1], dim_size=len(targets), reduce="sum")
        told = nn.functional.gelu(self.source(torch.cat([sources, surprise, known], dim=1)))
        heard = self.out(nn.functional.gelu(self.listen((told, targets), edge_index)))
        return self.row(targets) + self.gate * total / count.clamp(min=1) + heard


class Gnn(NoChange):
    """The linear map, then `DriftNetwork` for what it leaves; goes on from its last weights.

    In training each batch, and half of the other rows at random, are masked: the network must predict what it was not
    told, which is what it is for.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._net: DriftNetwork | None = None

    def fit(self, task: Task) -> Move:
        move = linear_map(task)
        scaled = Scaled(task, move)
        net = self._net = self._net or self._new(scaled.dim)
        self._fit(net, scaled, nearest_others(task.known, self.settings.neighbours, self.settings.threads))
        all_known = torch.ones(len(scaled.known), 1)

        @torch.no_grad()
        def moved(rows: np.ndarray) -> np.ndarray:
            near = nearest(rows, task.known, self.settings.neighbours, self.settings.threads)
            return unit_rows(move(rows) + scaled.unscale(_predict(net, scaled, all_known, scaled.inputs(rows), near)))

        return moved

    def state(self) -> dict[str, np.ndarray]:
        return {} if self._net is None else {name: value.numpy() for name, value in self._net.state_dict().items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        if state:
            self._net = self._new(state["row.0.weight"].shape[1])
            self._net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})

    def _new(self, dim: int) -> DriftNetwork:
        torch.manual_seed(self.settings.seed)
        return DriftNetwork(dim, self.settings)

    def _fit(self, net: DriftNetwork, scaled: Scaled, neighbours: np.ndarray) -> None:
        generator = torch.Generator().manual_seed(self.settings.seed)
        fit, held_out = split(len(scaled.known), generator)
        fit_only = torch.zeros(len(scaled.known), 1)
        fit_only[fit] = 1

        def error(rows: Tensor, known: Tensor) -> Tensor:
            predicted = _predict(net, scaled, known, scaled.known[rows], neighbours[rows.numpy()])
            return nn.functional.mse_loss(predicted, scaled.left[rows])

        def loss() -> Tensor:
            batch = fit[torch.randint(len(fit), (min(BATCH, len(fit)),), generator=generator)]
            known = fit_only * (torch.rand(fit_only.shape, generator=generator) < 0.5)
            known[batch] = 0
            return error(batch, known)

        train(net, loss, lambda: error(held_out, fit_only), self.settings.steps)


def _predict(net: DriftNetwork, scaled: Scaled, known: Tensor, targets: Tensor, neighbours: np.ndarray) -> Tensor:
    """Runs the net on the targets and only those known rows that are neighbours (positions [n, k]) of one."""
    used, position = np.unique(neighbours, return_inverse=True)
    edge_index = torch.from_numpy(edges(position.reshape(neighbours.shape)))
    rows = torch.from_numpy(used)
    return net(scaled.known[rows], scaled.left[rows], known[rows], targets, edge_index)
