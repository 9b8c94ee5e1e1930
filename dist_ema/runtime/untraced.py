"""Functions that ``torch.compile`` calls as they are, where they lie in what it compiles.

Followed into an update, it would compile hundreds of our frames in fragments, and the arithmetic with them, whose bits
are promised.
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
    """``torch.compiler.disable``, asked for when the function is called.

    It imports the compiler, which takes seconds. Every optimizer does so too; before one has, nothing is compiled.
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
