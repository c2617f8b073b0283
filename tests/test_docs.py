"""The code in the documentation runs, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ask_dist.losses.objective import ObjectiveOutput

PAGE = Path(__file__).parents[1] / "docs" / "plain_loop.md"


@pytest.fixture(scope="module")
def history() -> list[ObjectiveOutput]:
    """The outputs of all steps of the page's example."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names["history"]


def contrast(outputs: list[ObjectiveOutput]) -> float:
    return sum(float(output.terms["contrast"]) for output in outputs) / len(outputs)


def test_the_loss_falls_before_and_after_the_gate(history):
    assert len(history) == 200
    assert contrast(history[40:60]) < 0.7 * contrast(history[:5])
    assert contrast(history[-20:]) < 0.9 * contrast(history[60:80])


def test_knowledge_is_used_from_the_gate_on_with_every_term(history):
    assert [output.knowledge_used for output in history] == [False] * 60 + [True] * 140
    assert sorted(history[-1].terms) == ["coarse", "consistency", "contrast"]
    assert float(history[-1].terms["coarse"]) > 0


def test_the_bank_tells_how_far_pairs_can_be_trusted(history):
    assert (history[-1].reliability >= 0).all()
    assert history[-1].reliability.mean() > 0.5


def test_the_example_is_short():
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) < 60
