"""The learning rates of configs/quickstart.py: each run at each of the grid, compared on the validation split.

Command:   python -m experiments.train configs/quickstart_sweep.py
Hardware:  2 CPU cores; 14 minutes
"""

import dataclasses
from pathlib import Path

from experiments.config import Experiment, Measure
from experiments.configfile import load

_QUICKSTART = Path(__file__).with_name("quickstart.py")
_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def config() -> Experiment:
    """The sweep: the quickstart's base, runs and steps."""
    return _sweep(load(Experiment, _QUICKSTART), _RATES)


def small() -> Experiment:
    """The sweep of the quickstart's small form, at two learning rates."""
    return _sweep(load(Experiment, _QUICKSTART, small=True), _RATES[1:3])


def _sweep(quickstart: Experiment, rates: tuple[float, ...]) -> Experiment:
    measure = Measure(test=False, rounds=0)  # the test split is for the runs at the best rates
    return dataclasses.replace(quickstart, name=f"{quickstart.name}_sweep", rates=rates, measure=measure)
