"""The order in which samples are drawn."""

import random


def order(size: int, seed: int, start: int, count: int) -> list[int]:
    """Indices of `count` samples after the first `start`: every sample once, then all again.

    The order of each pass over the data follows from the seed and the number of the pass, so a
    facility goes on where it stopped with nothing kept but the number of samples it has seen.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), size)
        shuffled = list(range(size))
        random.Random(f"{seed}/{epoch}").shuffle(shuffled)  # noqa: S311 (not a secret)
        indices += shuffled[offset : offset + count - len(indices)]
    return indices
