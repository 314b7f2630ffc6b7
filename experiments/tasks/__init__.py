"""Tasks to try a method on: a base's old task and a new one, behind one interface for texts and images."""

from experiments.tasks.image import ImageTask as ImageTask
from experiments.tasks.loop import at_rate as at_rate
from experiments.tasks.loop import train as train
from experiments.tasks.pretraining import pretrained as pretrained
from experiments.tasks.task import Batches as Batches
from experiments.tasks.task import Metric as Metric
from experiments.tasks.task import Score as Score
from experiments.tasks.task import Scorer as Scorer
from experiments.tasks.task import Scores as Scores
from experiments.tasks.task import Task as Task
from experiments.tasks.task import rows as rows
from experiments.tasks.text import TextTask as TextTask
