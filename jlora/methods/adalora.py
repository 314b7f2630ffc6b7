"""AdaLoRA: a budget of singular values, given to the weights that need them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.methods.acts import Arrays, Factors, OnWeights, linear_in
from jlora.methods.checks import check_alpha, check_number, check_rank, check_whole
from jlora.methods.lora import low_rank
from jlora.methods.matrix import a_matrix, b_matrix, sizes
from jlora.methods.method import Config, Method, Training, Transformation
from jlora.transform.sites import Target
from jlora.transform.weight import Weight

SCALE_EPSILON = 1e-5  # of the divisor of the scale, as in the paper's code
_DEVIATION = 0.02  # of P and Q at the start, as in the paper's code


class Schedule(NamedTuple):
    """The cubic schedule of the budget, in steps.

    Attributes:
      total: of the whole run.
      warmup: t_i, during which nothing is pruned.
      final: t_f, during which the surviving triplets alone are trained.
      interval: Delta T between prunings.
    """

    total: int
    warmup: int
    final: int
    interval: int


class BudgetState(NamedTuple):
    """State of the budget from step to step.

    Attributes:
      step: the number of steps taken, int32, ().
      importance, uncertainty: the smoothed |w dL/dw| of every entry of A, B and E, and its smoothed deviation.
      kept: for each weight (stack, r), the triplets that the last pruning left.
      inner: state of the optimizer.
    """

    step: jax.Array
    importance: Factors
    uncertainty: Factors
    kept: dict[str, jax.Array]
    inner: Any


def adalora(
    rank: int = 12,
    target_rank: int = 8,
    alpha: float | None = None,
    *,
    total_steps: int,
    warmup: int = 0,
    final: int = 0,
    interval: int = 1,
    betas: tuple[float, float] = (0.85, 0.85),
    orthogonality: float = 0.5,
) -> Method:
    """AdaLoRA: `W + alpha / r * P diag(E) Q`, a budget of entries of E shared by all weights.

    Every step smooths the sensitivity |w dL/dw| of each entry of P, E, Q, and its deviation; a triplet's score is that
    of its entry of E plus the means over its column of P and its row of Q. At each pruning the triplets with the lowest
    scores of all weights have their entry of E set to zero, down to a budget that falls as a cubic from r to
    `target_rank` per weight. Shapes are static: nothing is compiled again. Until the final phase a pruned triplet may
    grow back; `to_lora` drops those that did not survive.

    P and Q (here B and A) are normal with deviation 0.02, E is zero. The loss has `orthogonality` times the mean over
    all P and Q of |P^T P - I| added to it, the Frobenius norm unsquared as in the paper's code (the paper squares it).

    Args:
      rank: r at the start, of every weight; 1.5 times `target_rank` in the paper.
      target_rank: the mean rank at the end.
      alpha: numerator of the scale, dimensionless. The target's rank when None.
      total_steps: of the training run.
      warmup: t_i, steps before the first pruning.
      final: t_f, steps at the end without pruning.
      interval: Delta T, steps between prunings.
      betas: of the two smoothings.
      orthogonality: gamma, dimensionless: 0.1 to 0.5 in the paper.

    Raises:
      ValueError: for ranks below 1, `target_rank` above `rank`, a schedule longer than the run, or a number that is
        none or out of its range.

    Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512,
    eq. 3, 4, 8 to 12; QingruZhang/AdaLoRA for the budget of step t (eq. 12 is not continuous at t_i).
    """
    rank, target_rank, alpha = check_rank(rank), check_rank(target_rank, "target_rank"), check_alpha(alpha)
    if target_rank > rank:
        raise ValueError(f"target_rank must be at most the initial rank, {rank}, not {target_rank}")
    schedule = check_schedule(total_steps, warmup, final, interval)
    betas = check_betas(betas)
    orthogonality = check_number(orthogonality, "orthogonality")
    if orthogonality < 0:
        raise ValueError(f"orthogonality must be at least 0, not {orthogonality!r}")
    config: Config = (
        ("name", "adalora"), ("rank", rank), ("target_rank", target_rank), ("alpha", alpha),
        ("total_steps", schedule.total), ("warmup", schedule.warmup), ("final", schedule.final),
        ("interval", schedule.interval), ("betas", betas), ("orthogonality", orthogonality),
    )  # fmt: skip

    def init(key: jax.Array, w: jax.Array, target: Target) -> Arrays:
        a_shape, b_shape = target.factor_shapes()
        one, two = jax.random.split(key)
        stack = [n if i in target.stack_axes else 1 for i, n in enumerate(target.shape)]
        return {
            "A": jax.random.normal(one, a_shape, jnp.float32) * _DEVIATION,
            "B": jax.random.normal(two, b_shape, jnp.float32) * _DEVIATION,
            "E": jnp.zeros((*stack, target.rank), jnp.float32),
        }

    def weight(w: jax.Array, target: Target, factors: Arrays, buffers: Arrays) -> Weight:
        return low_rank(
            w, target, factors["A"] * (factors["E"] * (target.alpha / (target.rank + SCALE_EPSILON))), factors["B"]
        )

    def regulariser(factors: Factors, targets: Sequence[Target]) -> jax.Array:
        distances = [
            _distance(m)
            for target in targets
            for m in (
                a_matrix(factors[target.path]["A"], target),
                b_matrix(factors[target.path]["B"], target).swapaxes(1, 2),
            )
        ]
        return orthogonality * jnp.mean(jnp.concatenate(distances))

    def wrap(tx: Transformation, targets: Sequence[Target]) -> Transformation:
        return budgeted(tx, tuple(targets), schedule, target_rank, betas)

    return Method(
        config, rank, alpha, OnWeights(init, weight, rescale=linear_in("E")), Training(None, regulariser, wrap)
    )


def check_schedule(total_steps: Any, warmup: Any, final: Any, interval: Any) -> Schedule:
    """Returns the schedule of a run.

    Raises:
      ValueError: if a number is no integer of its range, or no step is left for pruning.
    """
    total_steps, interval = check_rank(total_steps, "total_steps"), check_rank(interval, "interval")
    warmup, final = check_whole(warmup, "warmup"), check_whole(final, "final")
    if warmup + final >= total_steps:
        raise ValueError(
            f"adalora: a schedule longer than the run: warmup={warmup} and final={final} leave none of "
            f"total_steps={total_steps} for pruning"
        )
    if interval > total_steps - warmup - final:
        raise ValueError(
            f"adalora: interval={interval} is longer than the {total_steps - warmup - final} steps of pruning between "
            f"warmup={warmup} and final={final} of total_steps={total_steps}"
        )
    return Schedule(total_steps, warmup, final, interval)


def check_betas(betas: Any) -> tuple[float, float]:
    """Returns the two smoothings.

    Raises:
      ValueError: if they are not two numbers in [0, 1).
    """
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, of the sensitivity and of its deviation, not {betas!r}")
    betas = (check_number(betas[0], "betas[0]"), check_number(betas[1], "betas[1]"))
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be at least 0 and below 1, not {betas!r}")
    return betas


def _distance(m: jax.Array) -> jax.Array:
    """|m^T m - I| of each of the stacked matrices (stack, n, r); its gradient at 0 is 0."""
    gram = jnp.einsum("sni,snj->sij", m, m, precision="highest") - jnp.eye(m.shape[-1], dtype=m.dtype)[None]
    square = jnp.sum(gram**2, axis=(1, 2))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def budget(step: jax.Array, start: int, end: int, schedule: Schedule) -> jax.Array:
    """The number of triplets that step t may keep: `end + (start - end) (1 - (t - t_i) / (T - t_f - t_i))^3`."""
    pruning = schedule.total - schedule.final - schedule.warmup
    left = jnp.clip(1.0 - (step - schedule.warmup) / pruning, 0.0, 1.0)
    return jnp.floor((start - end) * left**3 + end).astype(jnp.int32)


def scores(importance: Arrays, uncertainty: Arrays, target: Target) -> jax.Array:
    """One score per triplet, (stack, r): E's own, plus the means over the column of P and the row of Q."""
    entry = {name: importance[name] * uncertainty[name] for name in ("A", "B", "E")}
    stack = sizes(target)[0]
    q, p = a_matrix(entry["A"], target).mean(1), b_matrix(entry["B"], target).mean(2)
    return entry["E"].reshape(stack, q.shape[-1]) + q + p


def lowest(values: jax.Array, count: jax.Array) -> jax.Array:
    """Mask of the values to keep: all above the `count`-th smallest. Ties go with it."""
    ascending = jnp.sort(values)
    return (values > ascending[jnp.maximum(count - 1, 0)]) | (count <= 0)


def budgeted(
    tx: Transformation, targets: tuple[Target, ...], schedule: Schedule, target_rank: int, betas: tuple[float, float]
) -> Transformation:
    """`tx`, after whose update the triplets over the budget lose their entry of E."""
    inner = optax.with_extra_args_support(tx)
    stacks = {target.path: sizes(target)[0] for target in targets}
    start = sum(stacks[target.path] * (target.rank) for target in targets)
    end = sum(stacks[target.path] * min(target_rank, target.rank) for target in targets)

    def adapted_part(factors: Factors) -> Factors:
        return {path: {name: factors[path][name] for name in ("A", "B", "E")} for path in stacks}

    def init(factors: Factors) -> BudgetState:
        zeros = jax.tree.map(jnp.zeros_like, adapted_part(factors))
        kept = {target.path: jnp.ones((stacks[target.path], target.rank), bool) for target in targets}
        return BudgetState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), kept, inner.init(factors))

    def update(gradients: Factors, state: BudgetState, factors: Factors, **extra: Any) -> Any:
        if factors is None:
            raise ValueError("adalora's budget needs the factors: tx.update(gradients, state, factors)")
        updates, after = inner.update(gradients, state.inner, factors, **extra)
        step = state.step + 1
        last = schedule.total - schedule.final
        trained = jax.tree.map(jnp.add, adapted_part(factors), adapted_part(updates))
        # The scores take part until the last pruning, and stay as they are from there on.
        counts = step <= last
        sensitivity = jax.tree.map(lambda w, g: jnp.abs(w * g), trained, adapted_part(gradients))
        smooth = lambda beta: lambda old, new: jnp.where(counts, beta * old + (1 - beta) * new, old)
        importance = jax.tree.map(smooth(betas[0]), state.importance, sensitivity)
        deviation = jax.tree.map(lambda s, i: jnp.abs(s - i), sensitivity, importance)
        uncertainty = jax.tree.map(smooth(betas[1]), state.uncertainty, deviation)

        by_site = [scores(importance[target.path], uncertainty[target.path], target) for target in targets]
        every = jnp.concatenate([s.reshape(-1) for s in by_site])
        keep = lowest(every, start - budget(step, start, end, schedule))
        edges = [math.prod(s.shape) for s in by_site]
        parts = jnp.split(keep, [sum(edges[: i + 1]) for i in range(len(edges) - 1)])
        prunes = (counts & (step > schedule.warmup) & (step % schedule.interval == 0)) | (step == last)
        kept = {
            target.path: jnp.where(prunes, part.reshape(s.shape), state.kept[target.path])
            for target, part, s in zip(targets, parts, by_site, strict=True)
        }
        masks = prunes | (step > last)
        updates = {
            path: arrays | {"E": _masked(arrays["E"], factors[path]["E"], kept[path] | ~masks)}
            if path in stacks
            else arrays
            for path, arrays in updates.items()
        }
        return updates, BudgetState(step, importance, uncertainty, kept, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _masked(update: jax.Array, value: jax.Array, kept: jax.Array) -> jax.Array:
    """The update that leaves E as updated where it is kept, and at zero elsewhere."""
    return jnp.where(kept.reshape(value.shape), update, -value)
