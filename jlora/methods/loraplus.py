"""LoRA+: a larger learning rate for B than for A."""

from collections.abc import Sequence

import jax
import optax

from jlora.methods.acts import Factors
from jlora.methods.checks import check_number
from jlora.methods.lora import lora
from jlora.methods.method import Config, Method, Transformation
from jlora.transform.sites import Target


def loraplus(
    rank: int, alpha: float | None = None, *, ratio: float = 16.0, init: str = "gaussian", dropout: float = 0.0
) -> Method:
    """LoRA whose B is trained with `ratio` times the learning rate of A.

    The optimizer's updates of every B are multiplied by the ratio after it (and its schedule) has made them; A and
    extras keep the learning rate that was given. An embedding, whose A is the zero one, has the ratio on A.

    Args:
      rank: r, the number of columns of A. At least 1.
      alpha: numerator of the scale, dimensionless. The target's rank when None.
      ratio: lambda, the learning rate of B over that of A, dimensionless.
      init: of A, as in `lora`.
      dropout: of the low-rank branch's input, as in `lora`.

    Raises:
      ValueError: if `ratio` is not positive and finite, and as in `lora`.

    Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, section 4: ratio 16.
    """
    ratio = check_number(ratio, "ratio")
    if ratio <= 0:
        raise ValueError(f"ratio must be positive, not {ratio!r}")
    plain = lora(rank, alpha, init=init, dropout=dropout)
    config: Config = (("name", "loraplus"), *plain.config[1:], ("ratio", ratio))

    def wrap(tx: Transformation, targets: Sequence[Target]) -> Transformation:
        started_at_zero = {target.path: "A" if target.kind == "embedding" else "B" for target in targets}

        def faster(updates: Factors) -> Factors:
            return {
                path: {n: u * ratio if started_at_zero.get(path) == n else u for n, u in arrays.items()}
                for path, arrays in updates.items()
            }

        return optax.chain(tx, optax.stateless(lambda updates, params: jax.tree.map(lambda u: u, faster(updates))))

    return plain._replace(config=config, training=plain.training._replace(wrap=wrap))
