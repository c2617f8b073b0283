"""Sinusoidal positions."""

from __future__ import annotations

import math

import pytest
import torch

from ask_dist.models.positions import sinusoids


@pytest.mark.parametrize("width", [8, 7])
def test_agrees_with_the_formula(width):
    wanted = torch.zeros(5, width)
    half = (width + 1) // 2
    for position in range(5):
        for column in range(width):
            angle = position / 10_000 ** (2 * (column % half) / width)
            wanted[position, column] = math.sin(angle) if column < half else math.cos(angle)
    torch.testing.assert_close(sinusoids(5, width, torch.zeros(1)), wanted)


def test_follows_the_dtype():
    assert sinusoids(3, 4, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
