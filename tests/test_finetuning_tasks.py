"""What the tasks of `experiments.tasks` compute; the whole of an experiment is in test_finetune.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.batches import Batches
from experiments.loop import Point, Result
from experiments.price import Plan
from experiments.report.results import Outcome, Results, Start
from experiments.report.tables import tables
from experiments.tasks.completion import per_token, shared
from experiments.tasks.task import Metric, smoothed

pytestmark = pytest.mark.once


class Uneven:
    """Rows of which 1, 7, 0 and 4 tokens count."""

    counts = (1, 7, 0, 4)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"loss_mask": np.arange(9) >= 9 - self.counts[i], "row": np.int32(i)}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_loss_is_that_of_the_tokens_however_the_batch_is_cut(parts):
    batch = shared(Batches(Uneven(), 4))(0)
    counts = batch["loss_mask"][:, 1:].sum(axis=1)
    sums = jnp.stack([jnp.asarray([3.0, 5.0, 0.0, 8.0]), jnp.asarray(counts, jnp.float32)], axis=1)  # (4, 2)
    cut = [slice(i, None, parts) for i in range(parts)]  # as train_step cuts: rows i, i + parts, ...
    losses = [per_token(sums[rows], {"share": jnp.asarray(batch["share"][rows])}) for rows in cut]
    np.testing.assert_allclose(np.mean(losses), 16 / counts.sum(), rtol=1e-6)


def test_smoothed_cross_entropy_is_that_of_smoothed_labels():
    logits = jnp.asarray([[2.0, 0.0, -1.0], [0.5, 0.1, 0.3]])
    labels = jnp.asarray([2, 0])
    target = 0.9 * np.eye(3)[np.asarray(labels)] + 0.1 / 3
    log_probs = np.asarray(logits) - np.log(np.exp(np.asarray(logits)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(smoothed(logits, labels, 0.1), -(target * log_probs).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(smoothed(logits, labels, 0.0), -log_probs[[0, 1], [2, 0]], rtol=1e-6)


def test_which_evaluation_decides():
    accuracy, loss = Metric("accuracy", "higher"), Metric("loss", "lower")
    old, new = {"accuracy": 1.0, "loss": 2.0}, {"accuracy": 2.0, "loss": 3.0}
    assert accuracy.beats(new, old) and not accuracy.beats(old, new) and not accuracy.beats(old, old)
    assert loss.beats(old, new) and not loss.beats(new, old)
    assert accuracy.beats(old, {"accuracy": float("nan")}) and not accuracy.beats({"accuracy": float("nan")}, old)


def test_runs_that_diverged_are_marked():
    points, accuracy = (Point(0, None, {"accuracy": 50.0}),), Metric("accuracy", "higher")
    runs = [
        Result(seed, 1e-3, points, 0, 1.0, 1.0, {"accuracy": 50.0}, diverged=words)
        for seed, words in enumerate((None, "loss is nan", None))
    ]
    plan = Plan(1, 1, 2, 4, 8, 8, 1.0)
    outcomes = tuple(Outcome("a", "A", "", "full()", plan, None, (), tuple(found)) for found in (runs, runs[:1]))
    scores, _ = tables(Results("", "", accuracy, accuracy, "new", None, Start(2, 8), outcomes))
    assert [row[0] for row in scores] == ["test split", "A (1 of 3 diverged)", "A"]
    assert [row[1] for row in scores] == ["accuracy", "50.00 ± 0.00", "50.00"]
