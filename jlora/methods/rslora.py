"""rsLoRA: a scale that does not shrink the update as the rank grows."""

import math

from jlora.methods.lora import scaled
from jlora.methods.method import Method


def rslora(rank: int, alpha: float | None = None, *, init: str = "gaussian", dropout: float = 0.0) -> Method:
    """Rank-stabilised LoRA: `W + alpha / sqrt(r) * B A`.

    The scale alpha/r of plain LoRA shrinks the update as r grows; alpha/sqrt(r) keeps its size independent of r.

    Args:
      rank: r, the number of columns of A. At least 1.
      alpha: numerator of the scale, dimensionless. The target's rank when None.
      init: of A, as in `lora`.
      dropout: of the low-rank branch's input, as in `lora`.

    Raises:
      ValueError: as in `lora`.

    Source: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732, eq. 5.
    """
    return scaled("rslora", lambda alpha, rank: alpha / math.sqrt(rank), rank, alpha, init, dropout)
