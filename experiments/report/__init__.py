"""Report of an experiment: its first lines, tables, plots and files at the end."""

from experiments.report.end import write as write
from experiments.report.results import Results as Results
from experiments.report.results import Start as Start
from experiments.report.samples import samples as samples
from experiments.report.sheets import sheets as sheets
from experiments.report.tables import opening as opening
from experiments.report.tables import planned as planned
