"""Decays that rise to a final one: the warm-ups of k-diffusion and of TensorFlow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ema.schedules.checks import fraction, positive, set_fields
from dist_ema.schedules.schedule import LOG_2, Capped, log


@dataclass(frozen=True)
class Warmup(Capped):
    """Batch n keeps min(decay, 1 - (1 + n / inv_gamma) ** -power), n = 1 for the first batch after the first copy.

    The warm-up of k-diffusion, ema-pytorch and diffusers (``use_ema_warmup=True``). Half life: while it warms up,
    about .693 * (1 + n / inv_gamma) ** power batches at batch n; afterwards that of :class:`ConstantDecay`.
    A gap costs time in proportion to the batches of warm-up in it (a million take about half a second).

    Args:
        decay: final kept fraction per batch, in [0, 1).
        inv_gamma: batches over which the warm-up begins, more than 0.
        power: 1 makes the warm-up a plain mean, 2/3 suits a million batches and more, 3/4 fewer; more than 0.

    >>> round(Warmup(0.999).retain(0, 1), 4), round(Warmup(0.999).retain(10**6, 10**6 + 1), 4)
    (0.37, 0.999)
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        set_fields(
            self,
            decay=fraction("decay", self.decay),
            inv_gamma=positive("inv_gamma", self.inv_gamma),
            power=positive("power", self.power),
        )

    def _ramp_end(self) -> float:
        try:
            return self.inv_gamma * math.expm1(-math.log1p(-self.decay) / self.power)
        except OverflowError:
            return math.inf

    def _log_ramp(self, first: int, last: int) -> float:
        return math.fsum(min(log(self.decay), self._log_factor(n)) for n in range(first, last + 1))

    def _log_factor(self, n: int) -> float:
        exponent = -self.power * math.log1p(n / self.inv_gamma)
        # Each form is exact where the other cancels.
        return math.log1p(-math.exp(exponent)) if exponent < -LOG_2 else log(-math.expm1(exponent))


@dataclass(frozen=True)
class NumUpdatesWarmup(Capped):
    """Batch n keeps min(decay, (1 + n) / (10 + n)), n = 1 for the first batch after the first copy.

    The ``num_updates`` rule of TensorFlow's ``ExponentialMovingAverage`` and the default of diffusers. Half life: while
    it warms up, about .077 * (10 + n) batches at batch n; afterwards that of :class:`ConstantDecay`.

    Args:
        decay: final kept fraction per batch, in [0, 1).

    >>> round(NumUpdatesWarmup(0.999).retain(0, 1), 4)  # 2 / 11
    0.1818
    """

    decay: float

    def __post_init__(self) -> None:
        set_fields(self, decay=fraction("decay", self.decay))

    def _ramp_end(self) -> float:
        return (10 * self.decay - 1) / (1 - self.decay)

    def _log_ramp(self, first: int, last: int) -> float:
        # All but nine numerators of the product of (1 + n) / (10 + n) are denominators as well.
        batches = last - first + 1
        return math.fsum(math.log1p(-batches / (last + k)) for k in range(2, 11))
