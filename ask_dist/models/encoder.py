"""What both towers are: a module that can be frozen, files that describe it, and a registry of those with names."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, Self, TypeVar

from torch import nn

from ask_dist.errors import InputError

Factory = TypeVar("Factory", bound=Callable[..., "Encoder"])
ENTRY_POINTS = "ask_dist.encoders"


class Encoder(nn.Module):
    """A tower.

    Attributes:
        output_dim: width of the vectors that it gives.
    """

    output_dim: int

    def assets(self) -> dict[str, bytes]:
        """The files (name -> bytes) beside the weights that a saved run needs to build the encoder again."""
        return {}

    def freeze(self) -> Self:
        """From now on the weights take no gradient, and the encoder stays in evaluation mode when its model trains.

        `requires_grad_(True)` lifts both: the weights learn, and `train()` reaches the layers again.
        """
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))


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

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """A decorator that makes a factory available under a name."""

        def add(factory: Factory) -> Factory:
            self._factories[name] = factory
            return factory

        return add

    def find(self, name: str) -> Factory:
        """The factory of a name; InputError when nobody registered it."""
        if name not in self._factories:
            for entry in entry_points(group=ENTRY_POINTS, name=name):
                entry.load()
        if name not in self._factories:
            known = ", ".join(sorted(self._factories))
            raise InputError(f"{self.setting}={name!r} is not registered; known: {known}")
        return self._factories[name]
