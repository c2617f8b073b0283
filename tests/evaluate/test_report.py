import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ask_dist.evaluate.long_tail import long_tail_metrics
from ask_dist.evaluate.report import Results, print_table, read_series, write_report

CONTRACT = {
    *("text_to_audio", "audio_to_text", "long_tail", "drift", "bank", "refine", "throughput", "config", "versions"),
    *("diagnostics", "reliability", "quarantine", "machine", "seconds"),
}
MINIMAL: Results = {
    "text_to_audio": {"R@1": 56.84, "R@5": 82.1, "R@10": 90.0, "mAP@10": 67.92, "median_rank": 1.0},
    "audio_to_text": {"R@1": 58.2, "R@5": 84.0, "R@10": 91.3, "mAP@10": 55.1, "median_rank": 1.5},
}
MARKUP = "<script>alert('x')</script>"


def full() -> Results:
    classes = [["piano"], ["viola"], ["gong", "piano"], ["never"]]
    return {
        **MINIMAL,
        "dataset": "test",
        "intervals": {"text_to_audio": {"R@1": (53.81, 59.92)}},
        "long_tail": long_tail_metrics(np.array([1, 2, 30, 1]), classes, {"piano": 1500, "viola": 40, "gong": 3}),
        "drift": {"audio": np.float32(0.25), "text": float("nan")},
        "bank": {"rows": np.int64(2500)},
        "refine": {"strategy": "gnn", "last": {"drift_after_audio": 0.0047}},
        "throughput": {"samples_per_second": 521.4},
        "diagnostics": {"out_of_batch_gradient_share": 0.214},
        "reliability": {
            "histogram": {"edges": np.linspace(0, 1, 3).tolist(), "clean": [1, 9], "swapped": [5, 1]},
            "auroc": 0.953,
        },
        "quarantine": {"count": 7, "leaks": 3, "examples": [{"name": MARKUP, "reason": f"undecodable {MARKUP}"}]},
        "config": {"name": MARKUP, "data": {"train": Path("shards/train")}},
        "versions": {"torch": "2.11.0"},
        "machine": {"cpu": MARKUP},
        "command": f"ask-dist train {MARKUP}",
        "seconds": 4321.0,
    }


def write_metrics(run_dir: Path) -> None:
    rows: list[dict[str, float]] = []
    for step in range(10, 210, 10):
        rows.append({"step": step, "time": step / 10, "train/loss": 3 / step, "train/samples_per_second": 500.0})
        rows.append({"step": step, "time": step / 10, "bank/rows": step, "bank/staleness": 5, "bank/late_share": 0.0})
    for generation in (1, 2, 3):
        rows.append({"step": 50 * generation, "refine/generation": generation, "refine/drift_before_audio": 0.4})
        rows.append({"step": 50 * generation, "refine/drift_after_audio": 0.01, "refine/overlap_after_text": 0.6})
        rows.append({"step": 50 * generation, "eval/validation/text_to_audio_R@1": 10.0 * generation})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Collects the tags with their attributes, and fails on a tag that closes what isn't open."""

    VOID = frozenset({"meta", "br", "path", "use"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_metrics(tmp_path)
    write_report(tmp_path, full())
    return tmp_path


def test_json_holds_the_contract(run_dir):
    report = json.loads((run_dir / "report.json").read_text())
    assert report.keys() >= CONTRACT
    assert report["text_to_audio"] == MINIMAL["text_to_audio"]
    assert report["long_tail"]["tail"] == {"queries": 2, "R@1": 50.0, "R@10": 50.0}
    assert report["drift"] == {"audio": 0.25, "text": None}
    assert report["bank"]["rows"] == 2500
    assert report["config"]["data"]["train"] == "shards/train"
    assert report["seconds"] == 4321.0


def test_parts_that_are_absent_are_null_and_the_page_does_without_them(tmp_path):
    write_report(tmp_path, MINIMAL)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name for name in CONTRACT if report[name] is not None} == {"text_to_audio", "audio_to_text"}
    html = (tmp_path / "report.html").read_text()
    Page(html)
    assert "56.8" in html
    assert "<svg" not in html
    assert "<h2>" not in html
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_page_shows_every_part(run_dir):
    html = (run_dir / "report.html").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        *("Training", "Knowledge bank", "Refinement", "Long tail", "Reliability"),
        *("Numbers at the end of the run", "Skipped samples", "Where this came from"),
    ]
    for shown in ("56.8", "53.8&ndash;59.9", "1 h 12 min", "521.4", "21.4", "0.953", "7 skipped", "2.11.0", "gnn"):
        assert shown in html
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert html.count("<svg ") == len(figures) == 11


def test_page_needs_nothing_from_outside_and_runs_nothing(run_dir):
    html = (run_dir / "report.html").read_text()
    page = Page(html)
    assert "://" not in html
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]


def test_markup_in_what_users_wrote_is_shown_and_not_obeyed(run_dir):
    html = (run_dir / "report.html").read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 5


def test_a_second_report_replaces_the_first(run_dir):
    write_report(run_dir, MINIMAL)
    assert json.loads((run_dir / "report.json").read_text())["bank"] is None
    assert "7 skipped" not in (run_dir / "report.html").read_text()


def test_a_long_tail_without_tail_queries_and_a_histogram_of_unknown_swaps_are_drawn(tmp_path):
    results = full() | {
        "long_tail": long_tail_metrics(np.array([1]), [["piano"]], {"piano": 5, "viola": 2, "gong": 1}),
        "reliability": {"histogram": {"edges": [0, 1], "clean": [4], "swapped": None}, "auroc": None},
    }
    write_report(tmp_path, results)
    html = (tmp_path / "report.html").read_text()
    assert "tail (0)" in html
    assert "swapped" not in html
    assert "AUROC" not in html


def test_series_take_the_last_word_on_a_step_and_pass_over_what_is_broken(tmp_path):
    lines = [
        '{"step": 20, "train/loss": 2.0}',
        '{"step": 10, "train/loss": 3.0, "note": "text", "bank/rows": null}',
        '{"step": 20, "train/loss": 1.5, "bank/rows": 7}',
        '{"step": 30, "train/loss": NaN}',
        '["no", "object"]',
        '{"train/loss": 9.0}',
        '{"step": 40, "train/lo',
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))
    series = read_series(path)
    assert series == {"train/loss": {10: 3.0, 20: 1.5}, "bank/rows": {20: 7.0}}
    assert list(series["train/loss"]) == [10, 20]
    assert read_series(tmp_path / "absent.jsonl") == {}


def test_table_shows_both_directions_and_the_groups():
    console = Console(file=io.StringIO(), width=120)
    print_table(full() | {"dataset": "[red]test"}, console)
    text = console.file.getvalue()
    assert "[red]test" in text
    rows = [re.findall(r"[\w.@→ ]*[\w→]", line) for line in text.splitlines() if "→" in line]
    assert [[cell.strip() for cell in row] for row in rows[:2]] == [
        ["text → audio", "56.8", "82.1", "90.0", "67.9", "1"],
        ["audio → text", "58.2", "84.0", "91.3", "55.1", "1.5"],
    ]
    assert "tail (2)" in text
