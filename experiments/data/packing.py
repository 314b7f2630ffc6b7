"""Several examples in one row, so that little of a batch is padding."""

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], capacity: int, *, open_rows: int = 32) -> list[list[int]]:
    """Puts items into rows of a capacity, in the order in which they come, each into the first row with room for it.

    Args:
      lengths: of the items, each at most the capacity.
      capacity: of a row.
      open_rows: how many rows are looked at; when there are more, the fullest one is closed. Keeps the time linear in
        the number of items.

    Returns:
      The rows, each with the items' numbers. Rows are in the order in which they were begun.

    >>> first_fit([5, 4, 2, 3, 1], capacity=7)
    [[0, 2], [1, 3], [4]]
    """
    rows: list[list[int]] = []
    free: dict[int, int] = {}  # row -> room left, for the open rows in order
    for item, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"item {item} has length {length}: more than a row of {capacity}")
        row = next((row for row, room in free.items() if room >= length), None)
        if row is None:
            if len(free) == open_rows:
                del free[min(free, key=free.__getitem__)]
            row, free[len(rows)] = len(rows), capacity
            rows.append([])
        rows[row].append(item)
        free[row] -= length
        if not free[row]:
            del free[row]
    return rows
