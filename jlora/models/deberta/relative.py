"""Which relative position each pair of tokens has: distances, logarithmic buckets, and the rows of a table that occur.

Source: He et al., arXiv 2006.03654, equation 3; the buckets as in Hugging Face's `make_log_bucket_position`.
"""

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """The rows of the table of relative positions that a sequence needs.

    Attributes:
      start, stop: of the table. A short sequence knows no long distance, so that it needs few of them.
      pairs: (length, length), int32: the row of query i and key j, counted from `start`.
    """

    start: int
    stop: int
    pairs: np.ndarray


def rows(length: int, span: int, *, buckets: int, reach: int) -> Rows:
    """The rows for sequences of `length` tokens, in a table of 2 * span.

    Row span + d is that of a query d tokens after its key, or in bucket d; what is further away has the last row.

    Args:
      length: of the sequences.
      span: half the rows of the table.
      buckets: of each direction; 0 or less for none: the distances as they are.
      reach: the distance that the last bucket ends at.

    Example:
      >>> rows(3, 4, buckets=0, reach=4)
      Rows(start=2, stop=7, pairs=array([[2, 1, 0],
             [3, 2, 1],
             [4, 3, 2]], dtype=int32))
    """
    places = np.arange(length)
    distances = places[:, None] - places[None]  # (length, length)
    if buckets > 0:
        distances = bucketed(distances, buckets, reach)
    table = np.clip(distances + span, 0, 2 * span - 1)
    start, stop = int(table.min()), int(table.max()) + 1
    return Rows(start, stop, (table - start).astype(np.int32))


def bucketed(distances: np.ndarray, buckets: int, reach: int) -> np.ndarray:
    """Distances up to buckets / 2 as they are, those up to `reach` in logarithmic steps below `buckets`.

    In float32, since that decides which side of a step a distance falls on in the models that are published.

    >>> bucketed(np.array([-9, -3, 0, 3, 5, 9, 15]), 8, 16)
    array([-6, -3,  0,  3,  5,  6,  7])
    """
    half = buckets // 2
    size = np.maximum(np.abs(distances), half).astype(np.float32)
    width = np.log(np.float32((reach - 1) / half))
    steps = np.ceil(np.log(size / np.float32(half)) / width * np.float32(half - 1)).astype(distances.dtype)
    found: np.ndarray = np.where(np.abs(distances) <= half, distances, (half + steps) * np.sign(distances))
    return found
