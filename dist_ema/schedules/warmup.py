"""Schedules whose decay rises to a final one: the warm-ups of k-diffusion, TensorFlow and ultralytics, and debiasing.

The first weights of a training are bad, and a large constant decay would keep them for long. A warm-up forgets them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import fraction, positive, set_fields
from dist_ema.schedules.schedule import LOG_2, Capped, Schedule, log

# 1 - exp(-40) is 1 in double precision, so after 40 tau a ramp has reached its decay.
_TAUS = 40


@dataclass(frozen=True)
class Warmup(Capped):
    """Keeps min(decay, 1 - (1 + n / inv_gamma) ** -power) in batch n, but at least ``min_decay``.

    n is 1 for the first batch after the first copy. This is the warm-up of k-diffusion, ema-pytorch and diffusers
    (``use_ema_warmup=True``). Half life during the warm-up: about .693 * (1 + n / inv_gamma) ** power batches at batch
    n; afterwards that of :class:`ConstantDecay`. The cost of a gap between two updates grows with the batches of the
    warm-up in it (a million batches take about half a second).

    Args:
        decay: fraction that is kept per batch after the warm-up, in [0, 1).
        inv_gamma: scale of the warm-up in batches, more than 0.
        power: exponent, more than 0. 1 makes the warm-up a plain mean. 2/3 suits runs of a million batches and more,
            3/4 shorter ones.
        min_decay: the smallest fraction that is kept, from 0 to ``decay`` (``min_value`` of ema-pytorch, ``min_decay``
            of diffusers); None means 0. Use it if the first weights are good, as in fine-tuning, so that the warm-up
            does not forget them.

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
        # The n at which 1 - (1 + n / inv_gamma) ** -power is ``decay``.
        try:
            return self.inv_gamma * math.expm1(-math.log1p(-self.decay) / self.power)
        except OverflowError:
            return math.inf

    def _log_ramp(self, first: int, last: int) -> float:
        lowest = log(self.min_decay or 0.0)
        highest = log(self.decay)
        return math.fsum(max(lowest, min(highest, self._log_factor(n))) for n in range(first, last + 1))

    def _log_factor(self, n: int) -> float:
        """Returns log(1 - (1 + n / inv_gamma) ** -power)."""
        exponent = -self.power * math.log1p(n / self.inv_gamma)
        # log(1 - exp(x)) in two forms. Each is exact where the other one subtracts nearly equal numbers.
        return math.log1p(-math.exp(exponent)) if exponent < -LOG_2 else log(-math.expm1(exponent))


@dataclass(frozen=True)
class NumUpdatesWarmup(Capped):
    """Keeps min(decay, (1 + n) / (10 + n)) in batch n. n is 1 for the first batch after the first copy.

    This is the ``num_updates`` rule of TensorFlow's ``ExponentialMovingAverage``, and the default of diffusers. Half
    life during the warm-up: about .077 * (10 + n) batches at batch n; afterwards that of :class:`ConstantDecay`.

    Args:
        decay: fraction that is kept per batch after the warm-up, in [0, 1).

    >>> round(NumUpdatesWarmup(0.999).retain(0, 1), 4)  # 2 / 11
    0.1818
    """

    decay: float

    def __post_init__(self) -> None:
        set_fields(self, decay=fraction("decay", self.decay))

    def _ramp_end(self) -> float:
        return (10 * self.decay - 1) / (1 - self.decay)

    def _log_ramp(self, first: int, last: int) -> float:
        # The product of (1 + n) / (10 + n) telescopes: every numerator is also a denominator, except nine at each end.
        # So nine terms are left, however many batches there are.
        batches = last - first + 1
        return math.fsum(math.log1p(-batches / (last + k)) for k in range(2, 11))


@dataclass(frozen=True)
class Ramp(Capped):
    """Keeps decay * (1 - exp(-n / tau)) in batch n. n is 1 for the first batch after the first copy.

    This is the rule of ultralytics and YOLOX (``ModelEMA``: decay .9999, tau 2000). Their average starts as a copy of
    the untrained model; call ``ema.update(batches=0, due=True)`` before the first step to do the same. mmengine's
    ``ExpMomentumEMA`` (``momentum`` = 1 - decay, ``gamma`` = tau) counts one more batch. Use it for their recipes, and
    for a warm-up of a fixed length: the average follows the weights closely for some tau batches. Half life while n is
    much less than tau: that of a decay of n / tau; after several tau that of :class:`ConstantDecay`. The cost of a gap
    between two updates grows with those of its batches that are in the first 40 tau.

    Args:
        decay: fraction that is kept per batch after the warm-up, in [0, 1).
        tau: scale of the warm-up in batches, more than 0. After tau batches .632 of ``decay`` is kept, after 5 tau
            .993 of it.

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
        """Returns log(1 - exp(-passed))."""
        # Each form is exact where the other one subtracts nearly equal numbers.
        return math.log1p(-math.exp(-passed)) if passed > LOG_2 else log(-math.expm1(-passed))


@dataclass(frozen=True)
class Debiased(Schedule):
    """Has a constant decay, but the first weights count as one batch only.

    After n batches the weights of batch i have the weight decay ** (n - i) / (1 + decay + ... + decay ** n), for i from
    0 to n. With :class:`ConstantDecay` the first weights have instead the weight of all batches before them, as if
    these had existed. This is the debiased average of optax (``ema(debias=True)``) and TensorFlow
    (``zero_debias=True``), and the correction that Adam makes for its moments.
    retain = decay ** passed * (1 - decay ** (before + 1)) / (1 - decay ** (after + 1)). Use it for short runs, and for
    averages that start from random weights. Half life: at first half of the run so far; after several half lives that
    of :class:`ConstantDecay`.

    Args:
        decay: fraction that is kept per batch in the long run, in [0, 1).

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
        # The log of (1 - e^before) / (1 - e^after), in a form that loses no digits if the fraction is close to 1.
        return constant + math.log1p(math.exp(before) * math.expm1(constant) / -math.expm1(after))
