"""Gradient noise scale: the batch size beyond which a larger one hardly learns more from a token.

McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A: from the squared norms of the
gradient of a small and of a large batch, unbiased estimates of the true gradient's and of the
noise's; their means over the steps, not those of their ratio. A token counts as an example.
"""

from dataclasses import dataclass


@dataclass
class GradientNoise:
    """Running estimate over the steps of a round."""

    gradient: float = 0.0
    """Sum over the steps of the estimates of the squared norm of the true gradient."""
    noise: float = 0.0
    """Sum over the steps of the estimates of the trace of the covariance of one token's."""
    steps: int = 0

    def add(self, small: float, small_norm: float, large: float, large_norm: float) -> None:
        """One step: tokens, and norm of the mean gradient, of a part of the batch and of all."""
        if not 0 < small < large:
            return
        a, b = small_norm**2, large_norm**2
        self.gradient += (large * b - small * a) / (large - small)
        self.noise += (a - b) / (1 / small - 1 / large)
        self.steps += 1

    def scale(self) -> float | None:
        """The scale in tokens; None where the steps do not tell it."""
        if self.steps == 0 or self.gradient <= 0 or self.noise < 0:
            return None
        return self.noise / self.gradient
