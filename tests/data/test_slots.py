import subprocess
import sys

import numpy as np

from ask_dist.data.slots import AHEAD, Slots

TOO_MUCH = """
import resource
from ask_dist.data.slots import Slots
from ask_dist.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    Slots(2, 16, 64000)
except InputError as error:
    print(error)
"""


def test_parts_lie_apart_until_a_turn_comes_round():
    slots = Slots(processes=2, clips=3, samples=5)
    for process in range(2):
        for part in range(AHEAD + 1):
            slots.of(process, part, 3)[:] = 10 * process + part
    for process in range(2):
        for part in range(AHEAD + 1):
            np.testing.assert_array_equal(slots.of(process, part, 2), np.full((2, 5), 10 * process + part))
    slots.of(1, AHEAD + 1, 3)[:] = 99
    assert (slots.of(1, 0, 3) == 99).all()
    assert (slots.of(0, 0, 3) == 0).all()


def test_clips_without_sounds_need_no_room():
    assert Slots(processes=2, clips=3, samples=0).of(1, 4, 3).shape == (3, 0)


def test_too_little_shared_memory_is_said_in_one_line():
    said = subprocess.run([sys.executable, "-c", TOO_MUCH], capture_output=True, text=True, check=True).stdout
    assert said.startswith("23 MiB of shared memory for 2 decoding processes can't be had: enlarge /dev/shm")
    assert said.count("\n") == 1
