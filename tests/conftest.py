"""Sends tests marked ``world_size(n)`` to the worker pool."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator

from support import pool
from support.pool import Pool

import pytest

_pool: Pool | None = None

#: The files that take longest, the longest first. A worker that began one of them last would run alone at the end.
LONGEST = [
    f"test_{name}.py"
    for name in (
        "kill",
        "transformers",
        "benchmark",
        "resume",
        "engines",
        "launch",
        "zero",
        "interrupts",
        "both",
        "newcomer",
        "offload",
        "kernels",
        "random_calls",
        "zero_parts",
        "gathered_weights",
        "import",
        "dcp",
    )
]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Under ``--dist loadfile``: files in our order. xdist's puts those of few tests, which are long ones, last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the longest files."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _close_pool() -> Iterator[None]:
    yield
    if _pool is not None:
        _pool.close()


@pytest.fixture
def rank() -> int:
    """This process's rank; set by the pool."""
    return 0


@pytest.fixture
def world_size() -> int:
    """How many ranks run the test; set by the pool."""
    return 1


@pytest.fixture(scope="session")
def server() -> multiprocessing.context.BaseContext:
    """Starts processes in milliseconds, forked from one that has imported everything and run nothing."""
    return pool.server()


@pytest.fixture(scope="session")
def references() -> dict[int, list[dict[str, int]]]:
    """What every average is after so many updates: that of one process, which is this one."""
    from support.any_engine import reference_digests  # imports torch

    return {steps: reference_digests(steps) for steps in (3, 5)}


@pytest.fixture
def on_ranks() -> Callable[..., None]:
    """Runs a test module's function in the pool: ``on_ranks(function, world_size, **arguments)``."""

    def call(function: Callable[..., object], world_size: int, **arguments: object) -> None:
        _shared_pool().run(function.__module__, function.__name__, arguments, world_size)

    return call


def _shared_pool() -> Pool:
    global _pool
    if _pool is None:
        _pool = Pool()
    return _pool


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a marked test in the pool: ``world_size(n)``, or ``world_size()`` with a parametrized ``world_size``."""
    marker = pyfuncitem.get_closest_marker("world_size")
    if marker is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    size = marker.args[0] if marker.args else arguments["world_size"]
    if "world_size" in arguments:
        arguments["world_size"] = size
    _shared_pool().run(pyfuncitem.module.__name__, pyfuncitem.originalname, arguments, size)
    return True
