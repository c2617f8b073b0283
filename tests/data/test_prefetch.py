from __future__ import annotations

from typing import Any

import pytest

from ask_dist.data.prefetch import prefetched
from ask_dist.errors import InputError


def test_prefetched_keeps_order_passes_errors_and_stops_when_closed() -> None:
    made: list[int] = []

    def numbers() -> Any:
        for number in range(100):
            made.append(number)
            yield number

    assert list(prefetched(numbers())) == list(range(100))
    made.clear()
    stream = prefetched(numbers())
    assert next(stream) == 0
    stream.close()
    assert len(made) <= 5

    def failing() -> Any:
        yield 1
        raise InputError("broken")

    stream = prefetched(failing())
    assert next(stream) == 1
    with pytest.raises(InputError, match="broken"):
        next(stream)
