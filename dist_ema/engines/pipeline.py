"""Several modules as one model, such as this rank's stages of a pipeline.

The specs and sources are those of the modules' engines, one after the other. So a number is that of a module's engine
plus the number of tensors before it::

    modules       [ stage 0          | stage 4      ]
    its numbers     0  1  2  3         0  1  2
    our numbers     0  1  2  3         4  5  6

Other ranks have other stages, and so other names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.engines.base import Engine, RemovableHandle
from dist_ema.engines.binding import Ignored
from dist_ema.errors import EMAEngineError
from dist_ema.geometry.spec import TensorSpec
from dist_ema.geometry.subclasses import CachedScale


class CompositeEngine(Engine):
    """Combines the engines of several modules."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = list(engines)
        self.group = self._engines[0].group
        self.publish_is_collective = any(engine.publish_is_collective for engine in self._engines)

    @property
    def is_part(self) -> bool:
        return self.group is not None and dist.get_world_size(self.group) > 1

    def modules(self) -> list[nn.Module]:
        return [module for engine in self._engines for module in engine.modules()]

    def _read_specs(self) -> list[TensorSpec]:
        specs = [spec for engine in self._engines for spec in engine.specs()]
        counts = Counter(name for spec in specs for name in (spec.name, *spec.aliases))
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            raise EMAEngineError(
                f"several modules of the list hold a tensor named {', '.join(repeated[:5])}: give the tensors of each "
                "pipeline stage the names that they have in the whole model"
            )
        return specs

    def _read_sources(self) -> list[Tensor]:
        sources = [source for engine in self._engines for source in engine.sources()]
        self.outdated = any(engine.outdated for engine in self._engines)
        # A list and not a generator in any(): resized() also resets its engine, so it has to be called on each of them.
        resized = [engine.resized() for engine in self._engines]
        if any(resized):
            self._announced = [spec for engine in self._engines for spec in engine.announced()]
            self._sizes = [spec.local_numel for spec in self._announced]
            self._resized = frozenset(range(len(sources)))
        return sources

    def ignore(self, ignored: Ignored) -> None:
        for engine in self._engines:
            engine.ignore(ignored)

    def _read_spec(self, number: int) -> TensorSpec:
        engine, first = self._engine_of(number)
        return engine.describe(number - first)

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        found: list[int] = []
        for number in numbers:
            engine, first = self._engine_of(number)
            found += [first + trained for trained in engine.trained([number - first])]
        return found

    def _engine_of(self, number: int) -> tuple[Engine, int]:
        """Returns the engine that has tensor ``number``, and the number of that engine's first tensor."""
        first = 0
        for engine in self._engines:
            size = len(engine.announced())
            if number < first + size:
                return engine, first
            first += size
        raise IndexError(f"there is no tensor number {number}")

    def write_counts(self) -> list[int]:
        return [count for engine in self._engines for count in engine.write_counts()]

    def rewritten_by_forward(self) -> frozenset[int]:
        numbers: set[int] = set()
        first = 0
        for engine in self._engines:
            numbers.update(first + number for number in engine.rewritten_by_forward())
            first += len(engine.sources())
        return frozenset(numbers)

    def ranks(self) -> frozenset[int]:
        return frozenset().union(*(engine.ranks() for engine in self._engines))

    def check_layout(self) -> None:
        for engine in self._engines:
            engine.check_layout()

    def layout(self, name: str) -> str:
        for engine in self._engines:
            layout = engine.layout(name)
            if layout:
                return layout
        return ""

    def stepped(self) -> bool:
        # A list and not a generator in all(): stepped() also resets its engine, so it has to be called on each of them.
        stepped = [engine.stepped() for engine in self._engines]
        return all(stepped)

    def reshard(self) -> None:
        for engine in self._engines:
            engine.reshard()

    def caches(self) -> list[CachedScale]:
        return [cache for engine in self._engines for cache in engine.caches()]

    def publish(self) -> None:
        for engine in self._engines:
            engine.publish()

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.own_buffers())
            yield

    def attach(self, optimizer: object, callback: Callable[[], object]) -> RemovableHandle:
        return self._engines[0].attach(optimizer, callback)
