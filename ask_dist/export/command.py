"""One folder out of a finished run, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ask_dist import config as configuration
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.export.card import published, write_card
from ask_dist.export.clap import write_clap
from ask_dist.export.graphs import write_graphs
from ask_dist.files import write_atomically, writing
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.saved import load_model, save_model


def export(run_dir: Path, form: str, folder: Path, console: Console) -> None:
    """Writes the model of a run in one of `FORMATS`, and README.md, the model card.

    Args:
        run_dir: a finished run.
        form: a key of `FORMATS`.
        folder: is made; may be there if it is empty.
        console: where the files are named.

    Raises:
        InputError: no such run, the folder is in use, or this model can't be written so.
    """
    config, model = load_model(run_dir)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} holds something already; name another folder for --output")
    if folder.resolve() == Path.cwd():  # a shell in it would be left in the one that was there before
        raise InputError(
            f"{folder} is the folder that the command runs in, which would be replaced; name one in it, such as model"
        )
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(folder):
            aside.mkdir(parents=True)
            FORMATS[form](aside, model, config)
            write_card(aside, run_dir, form, config, model)
            aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            console.print(str(path), highlight=False, soft_wrap=True)


def _write_run(folder: Path, model: DualEncoder, config: Config) -> None:
    """What `load_model` takes: other commands find in it a finished run without an index."""
    write_atomically(folder / "config.yaml", configuration.dump(published(config)).encode())
    save_model(folder / "model", model)


FORMATS: dict[str, Callable[[Path, DualEncoder, Config], None]] = {
    "transformers": write_clap,
    "safetensors": _write_run,
    "onnx": write_graphs,
}
