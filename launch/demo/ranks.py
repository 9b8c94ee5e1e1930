"""Steps that one process makes for all, or that all make and any may fail in: then every process raises the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def first(action: Callable[[], T], operation: str) -> T:
    """What ``action`` returns on rank 0, on every rank; an error of rank 0 is raised by all. Collective."""
    result: T = everywhere(lambda: action() if dist.get_rank() == 0 else None, operation)[0]
    return result


def everywhere(action: Callable[[], Any], operation: str) -> list[Any]:
    """What ``action`` returns on each rank. Collective. Raises RuntimeError, on all ranks, if it raised on any."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # the other processes wait to be told
        failure = error
    own = None if failure is None else f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (result, own))
    if texts := [text for _, text in found if text is not None]:
        raise RuntimeError(f"{operation} failed: {'; '.join(texts)}") from failure
    return [value for value, _ in found]
