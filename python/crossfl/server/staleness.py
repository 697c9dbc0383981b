"""How much less an update counts that is τ merges old, in FedAsync and what follows it.

Xie et al. 2019, https://arxiv.org/abs/1903.03934, section 5.2: constant, s = 1; polynomial,
s = (τ + 1)^−a; hinge, s = 1 up to b, then 1 / (a (τ − b) + 1). Credit (`server.credit`) has
a guard of its own; these are for comparison.
"""

from typing import Literal

Discount = Literal["constant", "polynomial", "hinge"]


def discount(kind: Discount, age: int, a: float = 0.5, b: float = 4.0) -> float:
    """The weight of an update that is `age` merges old, over that of a fresh one.

    Args:
        kind: the function.
        age: τ, merges between the model that it starts from and now.
        a: how fast polynomial and hinge fall; 0.5 and 10 in the paper.
        b: merges up to which hinge does not fall; 4 in the paper.

    Example:
        >>> discount("polynomial", 3)
        0.5
    """
    if kind == "polynomial":
        return float((age + 1) ** -a)
    if kind == "hinge" and age > b:
        return 1 / (a * (age - b) + 1)
    return 1.0
