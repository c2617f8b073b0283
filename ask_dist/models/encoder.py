"""What both towers are: a module that can be frozen, files that describe it, and a registry of those with names."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn

from ask_dist.errors import InputError

Factory = TypeVar("Factory", bound=Callable[..., "Encoder"])
ENTRY_POINTS = "ask_dist.encoders"
CHOICES = ("source", "pooling", "options")  # settings beside an encoder's name that one may read and another not


class Encoder(nn.Module):
    """A tower.

    Attributes:
        output_dim: width of the vectors that it gives.
        before_blocks: names of layers that come before the blocks, though they are registered after them.
        logit_scale: that of the contrast which it was trained in, where its folder says so; exponentiated.
        held: frozen for now; `thaws_at`: until this share of the run.
    """

    output_dim: int
    before_blocks: tuple[str, ...] = ()
    logit_scale: float | None = None
    held: bool = False
    thaws_at: float = 0.0

    def assets(self) -> dict[str, bytes]:
        """The files (name -> bytes) beside the weights that a saved run needs to build the encoder again."""
        return {}

    def tower_blocks(self) -> list[nn.Module]:
        """The layers of the tower in order of depth, the first nearest to the input; front end and heads are none.

        By default the entries of its list (`ModuleList`, `Sequential`) with the most weights; empty where it has none.
        """
        lists = [module for module in self.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        largest = max(lists, key=_weights, default=nn.ModuleList())
        return [block for block in largest if _weights(block)]

    def freeze(self, until: float | None = None) -> Self:
        """From now on the weights take no gradient, and the encoder stays in evaluation mode when its model trains.

        `requires_grad_(True)` lifts both: the weights learn, and `train()` reaches the layers again.

        Args:
            until: share of a run after which `advance` lifts both instead. The weights keep `requires_grad`, so that
                an optimizer can know them from its start; what the encoder computes till then does not lead to them.
                With 0 nothing is frozen.
        """
        if until is None:
            self.requires_grad_(False)
            return self.eval()
        self.thaws_at, self.held = until, until > 0.0
        return self.eval() if self.held else self

    def advance(self, progress: float) -> None:
        """Tells an encoder that is frozen until a share of the run how much of it lies behind."""
        held = progress < self.thaws_at
        if held != self.held:
            self.held = held
            self.train(not held)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.held):
            return super().__call__(*inputs, **named)

    def train(self, mode: bool = True) -> Self:
        learns = not self.held and any(parameter.requires_grad for parameter in self.parameters())
        return super().train(mode and learns)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Registry(Generic[Factory]):
    """Factories of encoders by name.

    A name that nobody registered is looked for among the entry points `ask_dist.encoders` of installed packages: the
    one of that name is a module, whose import registers it. A configuration can name such an encoder, never a module.

    Args:
        setting: the key that chooses, such as `model.audio.name`.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self._factories: dict[str, Factory] = {}
        self._reads: dict[str, tuple[str, ...]] = {}

    def register(self, name: str, reads: tuple[str, ...] = CHOICES) -> Callable[[Factory], Factory]:
        """A decorator that makes a factory available under a name.

        Args:
            name: in configurations.
            reads: which of `CHOICES` the encoder makes something of; a run that sets another is refused.
        """

        def add(factory: Factory) -> Factory:
            self._factories[name], self._reads[name] = factory, reads
            return factory

        return add

    def reads(self, name: str) -> tuple[str, ...]:
        """What the encoder of a name was registered to read of `CHOICES`; raises as `find` does."""
        self.find(name)
        return self._reads[name]

    def find(self, name: str) -> Factory:
        """The factory of a name; InputError when nobody registered it."""
        if name not in self._factories:
            for entry in entry_points(group=ENTRY_POINTS, name=name):
                entry.load()
        if name not in self._factories:
            known = ", ".join(sorted(self._factories))
            raise InputError(f"{self.setting}={name!r} is not registered; known: {known}")
        return self._factories[name]
