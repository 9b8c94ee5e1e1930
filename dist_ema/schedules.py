"""How much of an average survives between two moments of training. Pure Python, double precision.

A schedule is a retained fraction: ``retain(before, after)``. Fractions compose, ``retain(a, c) == retain(a, b) *
retain(b, c)``, so one update after k batches decays an average exactly as much as k updates after one batch each.
(:class:`Uniform` and :class:`Smoothing` count updates instead of training, so there k updates are not one.)

An update is ``shadow.lerp_(live, weight(before, after))``. The weight is ``-expm1(log_retain)`` and not ``1 - retain``,
which has lost ten digits at a decay of .999999.

Moments are :class:`~dist_ema.timing.Progress` readings since the first copy, or plain numbers in the schedule's own
unit: batches, except where a class says otherwise. Both count from zero at the first copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, TypeAlias

from dist_ema.errors import EMAConfigError
from dist_ema.timing import CLOCK_UNITS, Progress, Time

Moment: TypeAlias = Progress | float

_LOG_2 = math.log(2)


class Schedule(ABC):
    """What fraction of an average survives between two moments of training. Immutable, comparable, JSON-able."""

    def log_retain(self, before: Moment, after: Moment) -> float:
        """Natural logarithm of :meth:`retain`: 0 where nothing is forgotten, ``-inf`` where everything is.

        Raises:
            EMAConfigError: ``after`` lies before ``before``, or a plain number is negative or not finite.
        """
        start, stop = self._position(before, "before"), self._position(after, "after")
        if stop < start:
            raise EMAConfigError(f"after={after!r}: allowed is a moment not earlier than before={before!r}")
        return self._log_retain(start, stop) if start < stop else 0.0

    def retain(self, before: Moment, after: Moment) -> float:
        """The fraction, in [0, 1], of the average at ``before`` that is left at ``after``. Raises as ``log_retain``."""
        return math.exp(self.log_retain(before, after))

    def weight(self, before: Moment, after: Moment) -> float:
        """``1 - retain(before, after)`` to full double precision: the weight of ``lerp_``. Raises as ``log_retain``."""
        return -math.expm1(self.log_retain(before, after))

    def to_dict(self) -> dict[str, Any]:
        """Class name and options, for JSON; :func:`from_dict` reads it."""
        options = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}  # type: ignore[arg-type]
        return {"kind": type(self).__name__} | {name: value for name, value in options.items() if value is not None}

    @abstractmethod
    def _log_retain(self, start: float, stop: float) -> float:
        """``log_retain`` between two different positions in the schedule's own unit."""

    def _read(self, progress: Progress) -> float:
        """The position of a clock reading in the schedule's own unit."""
        return progress.batches

    def _position(self, moment: Moment, name: str) -> float:
        if isinstance(moment, Progress):
            return self._read(moment)
        position = _number(name, moment, "a Progress or a finite number, 0 or more")
        if position < 0:
            raise EMAConfigError(f"{name}={moment!r}: allowed is a Progress or a finite number, 0 or more")
        return position


class _PerBatch(Schedule):
    """A schedule given as one factor for each batch. Within a batch the average decays at a constant rate."""

    def _log_retain(self, start: float, stop: float) -> float:
        first, last = math.floor(start) + 1, math.ceil(stop)
        if first == last:
            return (stop - start) * self._log_factors(first, last)
        inner = self._log_factors(first + 1, last - 1) if first + 1 < last else 0.0
        head = (first - start) * self._log_factors(first, first)
        return head + inner + (stop - last + 1) * self._log_factors(last, last)

    @abstractmethod
    def _log_factors(self, first: int, last: int) -> float:
        """Sum of the logarithms of the factors of batches ``first`` to ``last``, both included; 1 <= first <= last."""


class _Capped(_PerBatch):
    """A per-batch schedule whose factor rises to a final decay and stays there; from then on any gap is cheap."""

    decay: float

    @abstractmethod
    def _ramp_end(self) -> float:
        """The batch from which on the factor is ``decay``; infinite if there is none."""

    @abstractmethod
    def _log_ramp(self, first: int, last: int) -> float:
        """``_log_factors`` of batches before the ramp's end."""

    def _log_factors(self, first: int, last: int) -> float:
        flat = max(first, math.ceil(min(self._ramp_end(), last + 1)))  # the first batch past the ramp
        ramp = self._log_ramp(first, flat - 1) if first < flat else 0.0
        return ramp + (last + 1 - flat) * _log(self.decay) if flat <= last else ramp


@dataclass(frozen=True)
class ConstantDecay(Schedule):
    """Every batch keeps ``decay`` of the average: retain = decay ** batches.

    Half life: log(1/2) / log(decay) batches, about .693 / (1 - decay). A decay of 0 keeps the last weights only.

    Args:
        decay: kept fraction per batch, in [0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        _set(self, decay=_fraction("decay", self.decay))

    def _log_retain(self, start: float, stop: float) -> float:
        return (stop - start) * _log(self.decay)


@dataclass(frozen=True)
class Smoothing(Schedule):
    """Every update keeps ``smoothing`` of the average, however much training lies between updates, as in Composer.

    Half life: log(1/2) / log(smoothing) updates. With updates every ``update_interval`` and a half life in the same
    unit, Composer uses smoothing = 2 ** -(update_interval / half_life), which is what :class:`HalfLife` amounts to.
    Plain numbers are updates since the first copy.

    Args:
        smoothing: kept fraction per update, in [0, 1).
    """

    smoothing: float

    def __post_init__(self) -> None:
        _set(self, smoothing=_fraction("smoothing", self.smoothing))

    def _read(self, progress: Progress) -> float:
        return progress.updates - 1

    def _log_retain(self, start: float, stop: float) -> float:
        return (stop - start) * _log(self.smoothing)


@dataclass(frozen=True)
class HalfLife(Schedule):
    """Half of the average is left after ``half_life`` more of training: retain = 2 ** -(passed / half_life).

    Composer's definition, in any unit of the clock. Plain numbers are in that unit.

    Args:
        half_life: ``"1000ba"``, ``"10000000tok"``, ``"50000sp"``, ``"2ep"``, or an int number of batches; more than 0.
    """

    half_life: str
    time: Time = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        time = Time.parse(self.half_life, option="half_life", units=CLOCK_UNITS)
        _set(self, time=time, half_life=str(time))

    def _read(self, progress: Progress) -> float:
        return progress.value(self.time.unit)

    def _log_retain(self, start: float, stop: float) -> float:
        return -_LOG_2 * ((stop - start) / self.time.value)


@dataclass(frozen=True)
class Warmup(_Capped):
    """Batch n keeps min(decay, 1 - (1 + n / inv_gamma) ** -power), n = 1 for the first batch after the first copy.

    The warm-up of k-diffusion, ema-pytorch and diffusers (``use_ema_warmup=True``). Half life: while it warms up,
    about .693 * (1 + n / inv_gamma) ** power batches at batch n; afterwards that of :class:`ConstantDecay`.
    A gap costs time in proportion to the batches of warm-up in it (a million take about half a second).

    Args:
        decay: final kept fraction per batch, in [0, 1).
        inv_gamma: batches over which the warm-up begins, more than 0.
        power: 1 makes the warm-up a plain mean, 2/3 suits a million batches and more, 3/4 fewer; more than 0.
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        _set(
            self,
            decay=_fraction("decay", self.decay),
            inv_gamma=_positive("inv_gamma", self.inv_gamma),
            power=_positive("power", self.power),
        )

    def _ramp_end(self) -> float:
        try:
            return self.inv_gamma * math.expm1(-math.log1p(-self.decay) / self.power)
        except OverflowError:
            return math.inf

    def _log_ramp(self, first: int, last: int) -> float:
        return math.fsum(min(_log(self.decay), self._log_factor(n)) for n in range(first, last + 1))

    def _log_factor(self, n: int) -> float:
        exponent = -self.power * math.log1p(n / self.inv_gamma)
        # Each form is exact where the other cancels.
        return math.log1p(-math.exp(exponent)) if exponent < -_LOG_2 else _log(-math.expm1(exponent))


@dataclass(frozen=True)
class NumUpdatesWarmup(_Capped):
    """Batch n keeps min(decay, (1 + n) / (10 + n)), n = 1 for the first batch after the first copy.

    The ``num_updates`` rule of TensorFlow's ``ExponentialMovingAverage`` and the default of diffusers. Half life: while
    it warms up, about .077 * (10 + n) batches at batch n; afterwards that of :class:`ConstantDecay`.

    Args:
        decay: final kept fraction per batch, in [0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        _set(self, decay=_fraction("decay", self.decay))

    def _ramp_end(self) -> float:
        return (10 * self.decay - 1) / (1 - self.decay)

    def _log_ramp(self, first: int, last: int) -> float:
        # All but nine numerators of the product of (1 + n) / (10 + n) are denominators as well.
        batches = last - first + 1
        return math.fsum(math.log1p(-batches / (last + k)) for k in range(2, 11))


@dataclass(frozen=True)
class PowerFunction(Schedule):
    """EDM2's power function average: weights at step t count in proportion to t ** gamma, whatever the run's length.

    retain = (t_before / t_after) ** (gamma + 1), with t = batches + 1, so the first copy is step 1. Its profile has a
    standard deviation of sigma_rel of the run: sigma_rel = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** .5.
    Karras et al. 2024 (arXiv:2312.02696), equations 123 and 127. Half life: the last 1 - 2 ** (-1 / (gamma + 1)) of
    the run, 3.8 % of it at sigma_rel .05 and 8.4 % at .10.

    Exactly one option is given.

    Args:
        sigma_rel: relative width of the profile, more than 0, at most 12 ** -.5 (.2886), where gamma is 0.
        gamma: exponent of the profile, 0 or more; 0 is the plain mean over batches.
    """

    sigma_rel: float | None = None
    gamma: float | None = None
    exponent: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise EMAConfigError(
                f"PowerFunction(sigma_rel={self.sigma_rel!r}, gamma={self.gamma!r}): give exactly one of the two"
            )
        if self.gamma is not None:
            gamma = _number("gamma", self.gamma, "a finite number, 0 or more")
            if gamma < 0:
                raise EMAConfigError(f"gamma={self.gamma!r}: allowed is a finite number, 0 or more")
            _set(self, gamma=gamma, exponent=gamma)
        else:
            _set(self, sigma_rel=float(self.sigma_rel), exponent=sigma_rel_to_gamma(self.sigma_rel))  # type: ignore[arg-type]

    def _log_retain(self, start: float, stop: float) -> float:
        return -(self.exponent + 1) * math.log1p((stop - start) / (start + 1))


@dataclass(frozen=True)
class HalfLifeFraction(_PerBatch):
    """The half life is a fixed fraction of the training so far: batch n keeps 2 ** (-1 / (fraction * n)).

    torchtitan's ``half_life_fraction``; n = 1 for the first batch after the first copy. Over batches a + 1 to b it
    comes to 2 ** (-(H_b - H_a) / fraction), H the harmonic numbers, close to (a / b) ** (.693 / fraction). Half life:
    fraction * n batches at batch n.

    Args:
        fraction: half life over training so far, more than 0 (torchtitan's default is .05).
    """

    fraction: float

    def __post_init__(self) -> None:
        _set(self, fraction=_positive("fraction", self.fraction))

    def _log_factors(self, first: int, last: int) -> float:
        return -_LOG_2 * (_harmonic(first - 1, last) / self.fraction)


@dataclass(frozen=True)
class Uniform(Schedule):
    """The plain mean of the weights seen at updates, the first copy among them (stochastic weight averaging).

    retain = seen_before / seen_after. It counts updates, so fewer of them give another mean. Izmailov et al. 2018
    (arXiv:1803.05407). Half life: as many updates as have been seen. Plain numbers are updates since the first copy:
    retain = (before + 1) / (after + 1).
    """

    def _read(self, progress: Progress) -> float:
        return progress.updates - 1

    def _log_retain(self, start: float, stop: float) -> float:
        return -math.log1p((stop - start) / (start + 1)) if start > -1 else -math.inf


KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (
        ConstantDecay,
        HalfLife,
        HalfLifeFraction,
        NumUpdatesWarmup,
        PowerFunction,
        Smoothing,
        Uniform,
        Warmup,
    )
}


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """The schedule that :meth:`Schedule.to_dict` described.

    Raises:
        EMAConfigError: not such a dict, an unknown kind, an unknown or missing option, or a value that is not allowed.
    """
    if not isinstance(data, Mapping):
        raise EMAConfigError(f"schedule={data!r}: allowed is a dict with 'kind' and its options")
    options = dict(data)
    kind = KINDS.get(str(options.pop("kind", None)))
    if kind is None:
        raise EMAConfigError(f"kind={data.get('kind')!r}: allowed is one of {', '.join(KINDS)}")
    known = [entry.name for entry in fields(kind) if entry.init]  # type: ignore[arg-type]
    if unknown := sorted(str(name) for name in options.keys() - set(known)):
        raise EMAConfigError(
            f"{kind.__name__} has no option {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}"
        )
    try:
        return kind(**options)
    except TypeError as error:  # what is missing, in Python's words
        raise EMAConfigError(f"schedule={data!r}: {error}; options: {', '.join(known)}") from error


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The gamma >= 0 with sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2 (EDM2, equations 123 and 126).

    Raises:
        EMAConfigError: ``sigma_rel`` is not in (0, 12 ** -.5].
    """
    allowed = f"a number more than 0 and at most 12 ** -.5 ({12**-0.5:.4f})"
    sigma = _number("sigma_rel", sigma_rel, allowed)
    if not 0 < sigma <= 12**-0.5 or math.isinf(1 / sigma):
        raise EMAConfigError(f"sigma_rel={sigma_rel!r}: allowed is {allowed}")
    # The width falls as gamma grows and is less than 1 / (gamma + 2), so the root is bracketed; halve to the last bit.
    low, high = 0.0, 1 / sigma
    while low < (middle := low + (high - low) / 2) < high:
        if math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > sigma:
            low = middle
        else:
            high = middle
    return high


def _harmonic(start: int, stop: int) -> float:
    """1 / (start + 1) + ... + 1 / stop, to double precision and at a bounded cost."""
    exact = min(stop, max(start, 1000)) if stop - start > 1000 else stop
    terms = [1 / n for n in range(start + 1, exact + 1)]
    if exact < stop:  # both past 1000: the asymptotic series, whose next term is below 1e-20
        series = [1 / (2 * n) - 1 / (12 * n**2) + 1 / (120 * n**4) for n in (stop, exact)]
        terms += [math.log1p((stop - exact) / exact), series[0], -series[1]]
    return math.fsum(terms)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _set(schedule: Schedule, **values: object) -> None:
    """Stores checked values in a frozen dataclass while it is being built."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)


def _number(name: str, value: object, allowed: str) -> float:
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond the range of floats
        pass
    raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")


def _fraction(name: str, value: object) -> float:
    allowed = "a number in [0, 1): the fraction of the average that is kept"
    number = _number(name, value, allowed)
    if not 0 <= number < 1:
        raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")
    return abs(number)  # no -0.0


def _positive(name: str, value: object) -> float:
    number = _number(name, value, "a finite number more than 0")
    if number <= 0:
        raise EMAConfigError(f"{name}={value!r}: allowed is a finite number more than 0")
    return number
