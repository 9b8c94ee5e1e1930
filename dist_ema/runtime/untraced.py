"""Excludes functions from ``torch.compile``, which then calls them as they are.

If it traced an update, it would compile hundreds of frames of this library in fragments, and the arithmetic with them,
whose bits are guaranteed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Does what ``torch.compiler.disable`` does, but only once the function is called.

    ``torch.compiler.disable`` imports the compiler, which takes seconds. Every optimizer imports it as well, and before
    that nothing is compiled.
    """
    compiler: Any = torch.compiler
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = compiler.disable(function)
        return disabled(*args, **kwargs)

    return call
