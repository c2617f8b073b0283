"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import json

from rich.console import Console

from ask_dist.train.progress import describe, live


def test_a_warning_is_shown_once_beside_the_progress(tmp_path):
    path, shown = tmp_path / "metrics.jsonl", io.StringIO()
    with live(Console(file=shown, width=120), path, 10):
        rows = [{"step": 1, "train/loss": 2.5}, {"step": 1, "warning": "mlflow failed: [gone]"}, {"step": 10}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert shown.getvalue().count("warning: mlflow failed: [gone]") == 1
    assert "step 10/10  loss 2.500" in shown.getvalue()


def test_memory_is_shown_of_the_process_and_of_its_gpu():
    assert describe({"memory/rss_gib": 1.26}) == "GiB 1.3"
    assert describe({"memory/rss_gib": 1.0, "memory/peak_gib": 20.0}) == "GiB 1.0  GPU GiB 20.0"
