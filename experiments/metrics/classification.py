"""Scores of classes and values, as GLUE has them: fractions of 1 in scikit-learn and SciPy, of 100 here.

Source: Wang et al., arXiv 1804.07461; the `datasets` library's glue metric, which the papers' code calls.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

from experiments.data.glue import task

Values = Sequence[int] | Sequence[float] | np.ndarray


def accuracy(predictions: Values, labels: Values) -> float:
    """Share of right predictions, in percent."""
    return 100 * float(metrics.accuracy_score(*_pair(predictions, labels)))


def f1(predictions: Values, labels: Values) -> float:
    """F1 of class 1, in percent; 0 where there is none, neither predicted nor true."""
    return 100 * float(metrics.f1_score(*_pair(predictions, labels), zero_division=0.0))


def macro_f1(predictions: Values, labels: Values) -> float:
    """The mean of the F1 of all classes, in percent; that of a class which is neither predicted nor true is 0."""
    return 100 * float(metrics.f1_score(*_pair(predictions, labels), average="macro", zero_division=0.0))


def matthews(predictions: Values, labels: Values) -> float:
    """Matthews' correlation coefficient times 100; 0 where all predictions are of one class."""
    return 100 * float(metrics.matthews_corrcoef(*_pair(predictions, labels)))


def pearson(predictions: Values, labels: Values) -> float:
    """Pearson's correlation times 100; NaN where all values are equal: it has no value there."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: Values, labels: Values) -> float:
    """Spearman's rank correlation times 100; NaN where all values are equal."""
    return _correlation(stats.spearmanr, predictions, labels)


_METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def glue(name: str, predictions: Values, labels: Values) -> dict[str, float]:
    """The scores of a GLUE task, the first being the one in the LoRA paper's Table 2.

    Args:
      name: of the task, one of `experiments.data.glue.GLUE`.
      predictions: classes, or values for STS-B.
      labels: the same.

    Raises:
      ValueError: if there is no such task, or not as many predictions as labels.
    """
    return {metric: _METRICS[metric](predictions, labels) for metric in task(name).metrics}


def _correlation(of: Any, predictions: Values, labels: Values) -> float:
    true, predicted = _pair(predictions, labels)
    if len(true) < 2 or np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    return 100 * float(of(predicted, true).statistic)


def _pair(predictions: Values, labels: Values) -> tuple[np.ndarray, np.ndarray]:
    """Labels first, as scikit-learn takes them."""
    true, predicted = np.asarray(labels), np.asarray(predictions)
    if true.shape != predicted.shape or true.ndim != 1 or not len(true):
        raise ValueError(f"predictions {predicted.shape} and labels {true.shape}: expected two rows of one length")
    return true, predicted
