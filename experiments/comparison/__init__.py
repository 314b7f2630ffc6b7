"""The parts of `experiments.compare`: its config, the trials, what they cost, the report and the plots."""

from experiments.comparison.config import Comparison as Comparison
from experiments.comparison.config import Contender as Contender
