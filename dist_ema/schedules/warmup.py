"""Decays that rise to a final one: the warm-ups of k-diffusion, TensorFlow and ultralytics, and debiased averages."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import fraction, positive, set_fields
from dist_ema.schedules.schedule import LOG_2, Capped, Schedule, log

# exp(-40) is less than the last bit of a double below 1: after so many tau a ramp has reached its decay.
_TAUS = 40


@dataclass(frozen=True)
class Warmup(Capped):
    """Batch n keeps min(decay, 1 - (1 + n / inv_gamma) ** -power), n = 1 for the first batch after the first copy.

    With ``min_decay`` it keeps at least that. The warm-up of k-diffusion, ema-pytorch and diffusers
    (``use_ema_warmup=True``). Half life: while it warms up, about .693 * (1 + n / inv_gamma) ** power batches at batch
    n; afterwards that of :class:`ConstantDecay`. A gap costs time in proportion to the batches of warm-up in it (a
    million take about half a second).

    Args:
        decay: final kept fraction per batch, in [0, 1).
        inv_gamma: batches over which the warm-up begins, more than 0.
        power: 1 makes the warm-up a plain mean, 2/3 suits a million batches and more, 3/4 fewer; more than 0.
        min_decay: the least kept fraction, from 0 to ``decay`` (``min_value`` of ema-pytorch, ``min_decay`` of
            diffusers); None means 0. Use it where the first weights are good, as in a fine-tuning run, and a warm-up
            would forget them.

    >>> round(Warmup(0.999).retain(0, 1), 4), round(Warmup(0.999).retain(10**6, 10**6 + 1), 4)
    (0.37, 0.999)
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float | None = None

    def __post_init__(self) -> None:
        set_fields(
            self,
            decay=fraction("decay", self.decay),
            inv_gamma=positive("inv_gamma", self.inv_gamma),
            power=positive("power", self.power),
        )
        if self.min_decay is not None:
            least = fraction("min_decay", self.min_decay)
            if least > self.decay:
                raise EMAConfigError(
                    f"min_decay={self.min_decay!r}: allowed is a number from 0 to decay={self.decay!r}, or None"
                )
            set_fields(self, min_decay=least)

    def _ramp_end(self) -> float:
        try:
            return self.inv_gamma * math.expm1(-math.log1p(-self.decay) / self.power)
        except OverflowError:
            return math.inf

    def _log_ramp(self, first: int, last: int) -> float:
        lowest = log(self.min_decay or 0.0)
        highest = log(self.decay)
        return math.fsum(max(lowest, min(highest, self._log_factor(n))) for n in range(first, last + 1))

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


@dataclass(frozen=True)
class Ramp(Capped):
    """Batch n keeps decay * (1 - exp(-n / tau)), n = 1 for the first batch after the first copy.

    The rule of ultralytics and YOLOX (``ModelEMA``: decay .9999, tau 2000), whose average starts as a copy of the
    untrained model: ``ema.update(batches=0, due=True)`` before the first step does the same. mmengine's
    ``ExpMomentumEMA`` (``momentum`` = 1 - decay, ``gamma`` = tau) counts one more batch. Use it to repeat their recipes
    and where the warm-up should have a fixed length: the average follows the weights closely for some tau batches.
    Half life: while n is small against tau, that of a decay of n / tau; after some tau, that of :class:`ConstantDecay`.
    A gap costs time in proportion to the batches in it of the first 40 tau.

    Args:
        decay: final kept fraction per batch, in [0, 1).
        tau: batches, more than 0: after tau of them the kept fraction is .632 of ``decay``, after 5 tau .993 of it.

    >>> round(Ramp(0.9999, 2000).retain(0, 1), 6), round(Ramp(0.9999, 2000).retain(10**5, 10**5 + 1), 6)
    (0.0005, 0.9999)
    """

    decay: float
    tau: float

    def __post_init__(self) -> None:
        set_fields(self, decay=fraction("decay", self.decay), tau=positive("tau", self.tau))

    def _ramp_end(self) -> float:
        return _TAUS * self.tau

    def _log_ramp(self, first: int, last: int) -> float:
        return math.fsum(log(self.decay) + self._log_part(n / self.tau) for n in range(first, last + 1))

    def _log_part(self, passed: float) -> float:
        """log(1 - exp(-passed)); each form is exact where the other cancels."""
        return math.log1p(-math.exp(-passed)) if passed > LOG_2 else log(-math.expm1(-passed))


@dataclass(frozen=True)
class Debiased(Schedule):
    """The average of a constant decay in which the first weights count as one batch.

    After n batches the weights of batch i, from 0 to n, weigh decay ** (n - i) / (1 + decay + ... + decay ** n): the
    debiased averages of optax (``ema(debias=True)``) and of TensorFlow (``zero_debias=True``), the correction that Adam
    makes for its moments. retain = decay ** passed * (1 - decay ** (before + 1)) / (1 - decay ** (after + 1)). Under
    :class:`ConstantDecay` the first weights count for all batches that were never seen. Use it for short runs and
    averages that start from random weights. Half life: that of :class:`ConstantDecay` once a few of these have passed,
    half of the run before.

    Args:
        decay: kept fraction per batch in the long run, in [0, 1).

    >>> [round(Debiased(0.9).retain(n, n + 1), 4) for n in (0, 1, 100)]  # .9 / 1.9, .9 * 1.9 / 2.71, .9
    [0.4737, 0.631, 0.9]
    """

    decay: float

    def __post_init__(self) -> None:
        set_fields(self, decay=fraction("decay", self.decay))

    def _log_retain(self, start: float, stop: float) -> float:
        constant = (stop - start) * log(self.decay)
        before = (start + 1) * log(self.decay)
        after = (stop + 1) * log(self.decay)
        # (1 - e^before) / (1 - e^after), without the digits that it would lose close to 1.
        return constant + math.log1p(math.exp(before) * math.expm1(constant) / -math.expm1(after))
