"""Which examples are held out, where nobody has said: by the hash of what each of them asks."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

from experiments.data.files import DataError

Split = Literal["train", "validation", "test"]


def held_out(
    keys: Sequence[str], fraction: float, *, strata: Sequence[Hashable] = (), test: bool = True
) -> list[Split]:
    """The split of each example, the same in every run and on every machine, whatever the order of the rows.

    Examples with one key go to one split, so that none is held out that is also learned. Of each stratum (a class) the
    same share is held out, and one that has a single key stays in the training split.

    Args:
      keys: what tells examples apart: the question, not its answer.
      fraction: of the keys that is held out, half of it for each of validation and test, at least one key for each.
      strata: of the examples, in order; one for all when empty.
      test: False for validation alone, of half the fraction.

    Raises:
      DataError: if the fraction is not between 0 and 0.5, or there are too few different keys.

    >>> held_out(["a", "b", "a", "c", "d"], 0.4)
    ['train', 'train', 'train', 'test', 'validation']
    """
    if not 0 < fraction <= 0.5:
        raise DataError(f"held_out={fraction:g} of the examples: expected more than 0 and at most 0.5")
    groups: dict[Hashable, set[str]] = defaultdict(set)
    stratum: dict[str, Hashable] = {}
    for key, of in zip(keys, strata or [0] * len(keys), strict=True):
        groups[stratum.setdefault(key, of)].add(key)  # a key with two classes is in that of its first row
    placed = []  # (how far within its stratum, hash, key): the first ones are taken, of each stratum alike
    for found in groups.values():
        order = sorted((hashlib.sha256(key.encode()).hexdigest(), key) for key in found)
        placed += [((i + 0.5) / len(order), digest, key) for i, (digest, key) in enumerate(order)]
    each = max(1, round(len(placed) * fraction / 2))
    taken = each * (2 if test else 1)
    if len(placed) <= taken:
        raise DataError(
            f"{len(placed)} different examples are too few to hold some of them out: give a file of their own for "
            "validation and test"
        )
    names: dict[str, Split] = {}
    for i, (_, _, key) in enumerate(sorted(placed)[:taken]):
        names[key] = "validation" if i < each else "test"
    return [names.get(key, "train") for key in keys]
