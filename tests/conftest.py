"""Sends tests marked ``world_size(n)`` to the worker pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from pool import Pool

_pool: Pool | None = None


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
