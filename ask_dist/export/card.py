"""The model card: what the model is, what it was trained on, what it scored, and how it is loaded."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from ask_dist import __version__
from ask_dist.config import Config
from ask_dist.files import write_atomically
from ask_dist.models.dual_encoder import DualEncoder

FILE = "README.md"


def write_card(folder: Path, run_dir: Path, form: str, config: Config, model: DualEncoder) -> None:
    """Writes README.md out of the run's configuration and its report.json, if it has one."""
    report = run_dir / "report.json"
    scores: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(files("ask_dist.export").joinpath("card.md").read_text(encoding="utf-8"))
    shown = published(config)
    text = template.render(
        config=shown,
        settings=yaml.safe_dump(shown.model_dump(mode="json", include={"data", "model", "optimization", "knowledge"})),
        form=form,
        padding=model.text.padding,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        scores={way: scores[way] for way in ("text_to_audio", "audio_to_text") if way in scores},
        intervals=scores.get("intervals") or {},
        dataset=scores.get("dataset"),
        throughput=scores.get("throughput") or {},
        version=__version__,
    )
    write_atomically(folder / FILE, text.encode())


def published(config: Config) -> Config:
    """The same run without places of this machine and its trackers: of data and sources the last two parts stay."""
    tree = config.model_dump(mode="json")
    tree["output_dir"] = "runs"
    for split in ("train", "validation", "test", "held_out"):
        tree["data"][split] = _tail(tree["data"][split])
    tree["data"]["cache_dir"] = tree["model"]["from"] = tree["bank"]["from"] = None
    tree["refine"]["corpus"] = tree["tracking"]["wandb"] = tree["tracking"]["mlflow"] = None
    for tower in ("audio", "text"):
        tree["model"][tower]["source"] = _tail(tree["model"][tower]["source"])
    return Config.model_validate(tree)


def _tail(path: Any) -> Any:
    """The end of a path, or of each of several."""
    if isinstance(path, list):
        return [_tail(part) for part in path]
    return None if path is None else str(Path(*Path(path).parts[-2:]))
