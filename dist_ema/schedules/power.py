"""EDM2's power function averages, given by an exponent or by the relative width of their profile."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import number, set_fields
from dist_ema.schedules.schedule import Schedule, log1p


@dataclass(frozen=True)
class PowerFunction(Schedule):
    """Weighs the weights of step t in proportion to t ** gamma, for every length of the run. EDM2's average.

    retain = (t_before / t_after) ** (gamma + 1), with t = batches + 1, so the first copy is step 1. The standard
    deviation of the profile is sigma_rel times the length of the run:
    sigma_rel = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** .5. Karras et al. 2024 (arXiv:2312.02696), equations
    123 and 127. Half life: the last 1 - 2 ** (-1 / (gamma + 1)) of the run, 3.8 % of it at sigma_rel .05 and 8.4 % at
    .10.

    Give exactly one of the two options.

    Args:
        sigma_rel: relative width of the profile, more than 0 and at most 12 ** -.5 (.2886), where gamma is 0.
        gamma: exponent of the profile, 0 or more. 0 is the plain mean over batches.

    >>> round(PowerFunction(gamma=1).retain(9, 19), 4)  # (10 / 20) ** 2
    0.25
    """

    elementwise: ClassVar[bool] = True
    sigma_rel: float | None = None
    gamma: float | None = None
    exponent: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise EMAConfigError(
                f"PowerFunction(sigma_rel={self.sigma_rel!r}, gamma={self.gamma!r}): give exactly one of the two"
            )
        if self.gamma is not None:
            gamma = number("gamma", self.gamma, "a finite number, 0 or more")
            if gamma < 0:
                raise EMAConfigError(f"gamma={self.gamma!r}: allowed is a finite number, 0 or more")
            set_fields(self, gamma=gamma, exponent=gamma)
        else:
            set_fields(self, sigma_rel=float(self.sigma_rel), exponent=sigma_rel_to_gamma(self.sigma_rel))  # type: ignore[arg-type]

    def _log_retain(self, start: float, stop: float) -> float:
        return -(self.exponent + 1) * log1p((stop - start) / (start + 1))


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Returns the gamma of a relative width: sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2, solved.

    gamma is 0 or more. EDM2, equations 123 and 126.

    Raises:
        EMAConfigError: ``sigma_rel`` is not in (0, 12 ** -.5].

    >>> round(sigma_rel_to_gamma(0.05), 4)
    16.9722
    """
    allowed = f"a number more than 0 and at most 12 ** -.5 ({12**-0.5:.4f})"
    sigma = number("sigma_rel", sigma_rel, allowed)
    if not 0 < sigma <= 12**-0.5 or math.isinf(1 / sigma):
        raise EMAConfigError(f"sigma_rel={sigma_rel!r}: allowed is {allowed}")
    # Bisection. The width decreases with gamma, and is less than 1 / (gamma + 2), so the root is below 1 / sigma. The
    # loop ends when no double lies between the two bounds.
    low = 0.0
    high = 1 / sigma
    while low < (middle := low + (high - low) / 2) < high:
        if math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > sigma:
            low = middle
        else:
            high = middle
    return high
