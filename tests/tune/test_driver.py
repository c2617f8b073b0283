"""What a sweep's table calls the settings."""

from __future__ import annotations

import pytest

from ask_dist.tune.driver import short_names


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["knowledge.reliability.gamma", "optimization.epochs"], ["gamma", "epochs"]),
        (["knowledge.start", "knowledge.reliability.start"], ["knowledge.start", "reliability.start"]),
        (["start", "knowledge.start"], ["start", "knowledge.start"]),
        (["bank.dtype", "bank.type"], ["dtype", "type"]),
        ([], []),
    ],
)
def test_a_setting_is_called_by_as_little_as_tells_it_apart(keys, names):
    assert short_names(keys) == names
