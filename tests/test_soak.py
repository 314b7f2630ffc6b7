"""Runs that are killed again and again, at random moments and by random signals: nothing is lost, bit for bit."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.pod import TIMEOUT, Started
from tests.test_train_processes import check_alike


def ended(started: Started, seconds: float) -> bool:
    """Whether all have ended by themselves within this time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if all(process.poll() is not None for process in started.processes):
            return True
        time.sleep(0.01)
    return False


STAND_IN = "tests/test_train_processes.py::test_sigterm_to_one_of_two_keeps_the_state_of_both_and_one_goes_on"


@pytest.mark.parametrize(
    ("count", "least"),
    [
        pytest.param(1, 4, marks=pytest.mark.thorough(STAND_IN)),
        pytest.param(1, 20, marks=pytest.mark.endless),
        pytest.param(2, 20, marks=pytest.mark.endless),
    ],
)
def test_kills_lose_nothing(tmp_path: Path, count: int, least: int):
    """Also while it loads, evaluates and writes. A run that comes to its end is compared, and another one begun."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it where the test fails
    chance, began = random.Random(seed), time.monotonic()
    whole = Started(tmp_path / "whole", count)
    assert whole.codes() == [0] * count, whole.said(0)
    length, kills, run = time.monotonic() - began, 0, 0
    while kills < least:
        started = Started(tmp_path / f"run_{run}", count)
        alone = ended(started, chance.uniform(0.2, 1.2) * length)
        if not alone:
            number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            started.send(number, to=chance.randrange(count))
            kills += 1
        codes = started.codes(seconds=TIMEOUT + 40)
        said = f"{codes}\n" + "\n\n".join(started.said(process) for process in range(count))
        assert all(code in (0, 1, 75, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT) for code in codes), said
        assert not alone or codes == [0] * count, said
        if codes == [0] * count:
            check_alike(tmp_path / f"run_{run}", tmp_path / "whole", 0.0)
            run += 1
    last = Started(tmp_path / f"run_{run}", count)
    assert last.codes() == [0] * count, last.said(0)
    check_alike(tmp_path / f"run_{run}", tmp_path / "whole", 0.0)
