"""Zero-shot classification: each class is a sentence or several, and a clip belongs to the nearest one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ask_dist.data.cache import cache_of
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.evaluate.encode import encode, need_clips
from ask_dist.evaluate.retrieval import TIE, bootstrap_interval
from ask_dist.files import write_atomically
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.saved import load_model

TEMPLATES = ("the sound of {}",)


def zero_shot(
    run_dir: Path, names: Path, shards: Path, templates: Sequence[str], output: Path | None, console: Console
) -> dict[str, Any]:
    """Classifies the clips of some shards with a run's model, prints the scores and returns them.

    Args:
        run_dir: a finished run.
        names: a text file with the name of a class in each line, as `classes` of the clips have it.
        shards: folder of shards.
        templates: sentences in which {} stands for a class.
        output: JSON file for the scores, or None.
        console: where the table goes.

    Returns:
        See `classify`; and `classes`, `clips`, `templates`, `dataset`.

    Raises:
        InputError: no such run, shards or classes; no clip has one of them.
    """
    config, model = load_model(run_dir)
    classes, templates = read_classes(names), check_templates(templates)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"encoding {shards}"):
        encoded = encode(model, ShardList.load(shards, cache=cache_of(config)), config, rank=0, world_size=1)
        need_clips(encoded)
        prompts = class_features(model, classes, templates)
    truth = labels(encoded.classes, classes)
    known = truth.any(axis=1)
    if not known.any():
        raise InputError(f"no clip of {shards} has a class that {names} names, such as {classes[0]!r}; compare the two")
    scores = (encoded.audio_features @ prompts.T).numpy()[known]
    results = classify(scores, truth[known], config.seed)
    results |= {
        "classes": len(classes),
        "clips": int(known.sum()),
        "templates": list(templates),
        "dataset": str(shards),
    }
    _print(results, len(encoded.keys), console)
    if output is not None:
        write_atomically(output, json.dumps(results, indent=2).encode())
    return results


def read_classes(path: Path) -> list[str]:
    """The names in a text file, a line each; InputError when it is missing, empty, or names one twice."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as text: {error}; give a file with a class in each line") from None
    names = [line for line in lines if line]
    if len(names) < 2:
        raise InputError(f"{path} names {len(names)} classes; at least two are needed, one in each line")
    seen = [_plain(name) for name in names]
    twice = next((name for name, plain in zip(names, seen, strict=True) if seen.count(plain) > 1), None)
    if twice is not None:
        raise InputError(f"{path} names {twice!r} twice; leave one of them out")
    return names


def check_templates(templates: Sequence[str]) -> Sequence[str]:
    """The templates, or InputError for one without a place for the class."""
    for template in templates:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise InputError(f"--template {template!r} needs one {{}}, where the class stands")
    return templates


@torch.no_grad()
def class_features(model: DualEncoder, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """float32 [classes, dim] on the CPU: the mean over the templates of a class's sentences, at unit length."""
    device = next(model.parameters()).device
    model.eval()
    words = [_plain(name) for name in classes]
    parts = [
        model.encode_text(model.text.tokenize([template.format(word) for word in words]).to(device)).cpu()
        for template in templates
    ]
    return F.normalize(torch.stack(parts).mean(dim=0), dim=-1)


def labels(clips: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """bool [clips, classes]. Capitals count for nothing, and an underscore is a space."""
    place = {_plain(name): column for column, name in enumerate(classes)}
    truth = np.zeros((len(clips), len(classes)), dtype=bool)
    for row, names in enumerate(clips):
        for name in names:
            if _plain(name) in place:
                truth[row, place[_plain(name)]] = True
    return truth


def classify(scores: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, Any]:
    """How well scores tell classes.

    Args:
        scores: [clips, classes], higher for likelier ones.
        truth: bool [clips, classes], one true or more in a row.
        seed: of the bootstrap.

    Returns:
        mAP: in percent, the mean over the classes that some clip has; where each clip has one class alone, also top1
        and top5 in percent, and `interval`, the 95% interval of top1. Of equal scores the wrong one counts as higher.
    """
    present = truth.any(axis=0)
    columns = zip(scores.T[present], truth.T[present], strict=True)
    results: dict[str, Any] = {"mAP": 100.0 * float(np.mean([average_precision(*column) for column in columns]))}
    if (truth.sum(axis=1) == 1).all():
        own = scores[truth][:, None]
        ahead = ((scores > own - TIE) & ~truth).sum(axis=1)
        first = 100.0 * (ahead < 1)
        results |= {"top1": float(first.mean()), "top5": float(100.0 * (ahead < 5).mean())}
        results["interval"] = bootstrap_interval(first, seed)
    return results


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """From 0 to 1, over all clips in the order of their scores; clips with equal scores come with the wrong ones first.

    Args:
        scores: [clips].
        truth: bool [clips], one true at least.
    """
    right = np.sort(scores[truth])[::-1]
    wrong = np.sort(scores[~truth])
    ahead = len(wrong) - np.searchsorted(wrong, right - TIE, side="left")
    found = np.arange(1, len(right) + 1)
    return float(np.mean(found / (found + ahead)))


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _print(results: dict[str, Any], clips: int, console: Console) -> None:
    columns = {"top1": "top-1", "top5": "top-5", "mAP": "mAP"}
    shown = [key for key in columns if key in results]
    table = Table("classes", "clips", *(columns[key] for key in shown), title="zero-shot, %", title_justify="left")
    cells = {key: f"{results[key]:.1f}" for key in shown}
    if "interval" in results:
        low, high = results["interval"]
        cells["top1"] += f" ({low:.1f} to {high:.1f})"
    table.add_row(str(results["classes"]), str(results["clips"]), *cells.values())
    console.print(table)
    if results["clips"] < clips:
        console.print(f"{clips - results['clips']} of {clips} clips have none of the classes and were left out")
