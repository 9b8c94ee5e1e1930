"""Computes the weights of a merge from a list, or from a scheme's name. Pure.

Sources are in the order of training, the oldest first. Their weights are c_0 to c_k for k + 1 sources.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.window import SHAPES

#: What a sum of weights may miss 1 by: they are written in decimals.
_SLACK = 1e-6
_SCHEMES = "uniform, lawa:K, ema:ALPHA, wsm:linear, wsm:sqrt, wsm:cosine and wsm:W1,W2,..."


def scheme_weights(scheme: str, count: int) -> list[float]:
    """Returns the weights of ``count`` sources by a scheme's name; they sum to 1.

    ``uniform``
        c_j = 1 / (k + 1): the plain mean, as PMA takes it (arXiv:2505.12082).
    ``lawa:K``
        the plain mean of the last K (LAWA, arXiv:2209.14981); the others weigh 0.
    ``ema:ALPHA``
        a_0 = theta_0, a_j = (1 - ALPHA) a_(j-1) + ALPHA theta_j: c_0 = (1 - ALPHA)^k and
        c_j = ALPHA (1 - ALPHA)^(k - j).
    ``wsm:SHAPE``, ``wsm:W1,W2,...``
        what a learning rate would have given that falls over the training between the sources (WSM,
        arXiv:2507.17634): the step from source j - 1 to source j counts w_j times, so c_0 = 1 - w_1,
        c_j = w_j - w_(j+1) and c_k = w_k. Of a shape the rate reaches 0 one step after the last source:
        w_j = 1 - s(j / (k + 1)) with s(x) = x (``linear``: the plain mean), sqrt(x) (``sqrt``) or
        (1 - cos(pi x)) / 2 (``cosine``). With W1, W2, ... there is one number for each step, k in all.

    Raises:
        EMAConfigError: no such scheme, or not one of ``count`` sources.

    >>> scheme_weights("wsm:0.75,0.25", 3)
    [0.25, 0.5, 0.25]
    >>> scheme_weights("ema:0.5", 3)
    [0.25, 0.25, 0.5]
    """
    name, _, argument = scheme.partition(":") if isinstance(scheme, str) else ("", "", "")
    if name == "uniform" and not argument:
        return [1 / count] * count
    if name == "lawa" and re.fullmatch(r"[1-9][0-9]{0,9}", argument):
        last = int(argument)
        if last > count:
            raise EMAConfigError(f"scheme={scheme!r}: there are {count} sources")
        return [0.0] * (count - last) + [1 / last] * last
    if name == "ema" and (alpha := _number(argument)) is not None and 0 < alpha <= 1:
        return [(1 - alpha) ** (count - 1), *(alpha * (1 - alpha) ** (count - 1 - j) for j in range(1, count))]
    if name == "wsm" and argument in SHAPES and argument != "uniform":
        weigh = SHAPES[argument]
        return [weigh(j / count, (j + 1) / count) for j in range(count)]
    factors = [_number(text) for text in argument.split(",")]
    if name == "wsm" and all(factor is not None for factor in factors):
        kept = [factor for factor in factors if factor is not None]
        if len(kept) != count - 1:
            raise EMAConfigError(
                f"scheme={scheme!r} has {len(kept)} numbers; {count} sources have {count - 1} steps between them"
            )
        return [before - after for before, after in zip([1.0, *kept], [*kept, 0.0], strict=True)]
    raise EMAConfigError(f"scheme={scheme!r}: allowed are {_SCHEMES}")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def check_weights(weights: Sequence[float], count: int, any_sum: bool, normalize: bool) -> list[float]:
    """Returns the weights that a user gave, as floats. Negative weights are allowed.

    Args:
        weights: the weight of each source.
        count: the number of sources.
        any_sum: allow a sum that is not 1.
        normalize: divide them by their sum.

    Raises:
        EMAConfigError: there is not one finite number for each source, or the sum is not allowed.
    """
    try:
        found = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        found = []
    if len(found) != count or not all(map(math.isfinite, found)):
        raise EMAConfigError(f"weights={weights!r}: allowed is a finite number for each of the {count} sources")
    if not any(found):
        raise EMAConfigError(f"weights={weights!r}: all weights are zero")
    total = math.fsum(found)
    if normalize:
        if abs(total) <= _SLACK * math.fsum(map(abs, found)):
            raise EMAConfigError(f"weights={weights!r} sum to {total:.9g}, so that no factor makes them sum to 1")
        return [weight / total for weight in found]
    if abs(total - 1) > _SLACK and not any_sum:
        raise EMAConfigError(
            f"weights={weights!r} sum to {total:.9g}, not to 1: give normalize=True to divide them by their sum, or "
            "any_sum=True if that sum is meant"
        )
    return found
