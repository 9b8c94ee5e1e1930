"""Defines what the library asks of an engine: the order of the calls, who makes them, and what they may cost.

Kinds of tensor, named once:

- *source*: the tensor that is averaged. The live parameter's local shard, or its slice of the fp32 master weights where
  the engine has them (DeepSpeed). Plain ``torch.Tensor``, never a ``DTensor``.
- *live*: what the model computes with. The same memory as the source, or made from it by :meth:`Engine.publish`.

Call order, for one average:

1. ``specs()`` once, at construction and at ``reset()`` (every rank, local): names, shapes and runs; weights may still
   be on the meta device. Full copies that a forward pass left behind are dropped first.
2. ``stepped()`` at each ``update()`` (every rank, local): was there a real optimizer step?
3. ``reshard()`` then ``sources()`` at each update that is due and before any other read or write (every rank, local).
   Afterwards ``outdated`` and ``resized`` say what has changed without harm, and ``trained()`` what is trained now.
4. ``publish()`` after sources were written (every rank, collective where the layout needs it): afterwards the next
   forward computes with what the sources hold.
5. ``attach()`` at the user's wish (every rank, local).

An engine implements ``_read_specs()``, ``_read_sources()``, ``_read_spec()`` and ``_trained_of()``. ``specs()`` and
``sources()`` check for every engine that what it hands out fits what it announced, so that no kernel reads past a
source.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.engines.binding import Binding, Ignored, ignore_nothing
from dist_ema.engines.names import walk_modules
from dist_ema.engines.wrappers import OuterStep, is_other_wrapper, is_training_step, unwrap_optimizer
from dist_ema.errors import EMAConfigError, EMAStateError
from dist_ema.geometry.spec import TensorSpec
from dist_ema.geometry.subclasses import CachedScale
from dist_ema.runtime.untraced import untraced

logger = logging.getLogger(__name__)


class RemovableHandle(Protocol):
    """Removes a hook; :meth:`ShardedEMA.attach` returns one."""

    def remove(self) -> None: ...


class Attached:
    """A handle that also tells its maker that it was removed."""

    def __init__(self, inner: RemovableHandle, removed: Callable[[], None]) -> None:
        self._inner = inner
        self._removed = removed

    def remove(self) -> None:
        """Stops the updates. Local."""
        self._inner.remove()
        self._removed()


def write_count(tensor: Tensor) -> int:
    """Counts how often torch has seen a tensor or a view of it written; 0 for inference tensors, without a counter."""
    return 0 if tensor.is_inference() else tensor._version


class Engine(ABC):
    """One way of sharding a model. Subclasses touch a wrapper's private attributes; nothing else does."""

    #: Ranks that take part in collective calls; None in a run without a process group.
    group: dist.ProcessGroup | None = None
    #: Whether :meth:`publish` is a collective call, of all ranks of ``group``.
    publish_is_collective: bool = False
    #: Whether ignored tensors were added or removed since ``specs()``, so that it has to be called again.
    outdated: bool = False

    _announced: list[TensorSpec]
    _sizes: list[int]
    _resized: frozenset[int] = frozenset()
    _used = False  # whether sources with memory of their own were handed out since specs()
    _ignored: Ignored = staticmethod(ignore_nothing)

    def ignore(self, ignored: Ignored) -> None:
        """Sets which tensors are in no average. Local; takes effect at the next ``specs()``.

        They may be added, removed, replaced and resized at any time. ``ignored`` is called with a canonical name, and
        whether that is a buffer's.
        """
        self._ignored = ignored

    def specs(self) -> list[TensorSpec]:
        """Returns every parameter and persistent buffer once, in the order of the plain model's ``state_dict()``.
        Local.
        """
        specs = list(self._read_specs())
        self._announced, self._sizes, self._used = specs, [spec.local_numel for spec in specs], False
        self._resized, self.outdated = frozenset(), False
        return specs

    def announced(self) -> list[TensorSpec]:
        """Returns the specs of the last ``specs()`` call, with the present shapes of what was resized. Local."""
        return list(self._announced)

    def resized(self) -> bool:
        """Returns whether a tensor has changed its shape since this was last asked: a buffer, or an ignored tensor.
        Local.
        """
        found, self._resized = bool(self._resized), frozenset()
        return found

    def trained(self, numbers: Sequence[int]) -> list[int]:
        """Selects those of these parameters, given by their numbers in ``specs()``, that are trained now. Local.

        Call it after ``sources()``. A flag (``requires_grad``) says it; under DeepSpeed, the optimizer's groups.
        """
        with torch._C.DisableTorchFunctionSubclass():  # a DTensor's attribute costs more than the tensor's otherwise
            return self._trained_of(numbers)

    def describe(self, number: int) -> TensorSpec:
        """Returns the spec of one tensor as it is now; it is announced from now on. Local."""
        spec = self._read_spec(number)
        self._announced[number], self._sizes[number] = spec, spec.local_numel
        return spec

    def replace_buffer(self, old: Tensor, new: Tensor) -> None:
        """Puts ``new`` into every place of the model that holds the buffer ``old``. Local.

        For a buffer whose shape is not that of the value it has to take. Raises EMAStateError if no place holds it.
        """
        places = [
            (module, key)
            for root in self.modules()
            for module in root.modules()
            for key, held in module._buffers.items()
            if held is old
        ]
        for module, key in places:
            module._buffers[key] = new
        if not places:
            raise EMAStateError(
                f"a sharded buffer of shape {tuple(old.shape)} cannot take a value of shape {tuple(new.shape)}: give "
                "buffers='ignore', or exclude= with its name"
            )

    def sources(self) -> list[Tensor]:
        """Returns this rank's elements of every spec of the last ``specs()`` call, in its order. Local; no copy, no
        host sync.

        Each has as many elements as the spec's runs, in their order when flattened row-major. Writing into them, then
        calling :meth:`publish`, changes the live model. Raises EMAStateError, naming the parameter, if one was
        added, replaced or sharded otherwise since ``specs()``. What is ignored is not checked, and a buffer may have
        another shape: ``announced()`` then has it. Of an ignored tensor that was removed the source is empty.
        """
        sources = self._read_sources()
        if list(map(Tensor.numel, sources)) != self._sizes:  # at C speed: 35 us for a thousand tensors
            raise self._misfit(sources)
        if not self._used:
            self._check_first(sources)
            # On the meta device the model may still be sharded before its weights exist: look again then.
            self._used = not any(source.is_meta for source in sources)
        return sources

    def write_counts(self) -> list[int]:
        """Counts how often torch has seen each source written, in the order of ``sources()``. Local; no host sync.

        Only a difference between two calls says something. Writes through ``.data`` are not counted.
        """
        return list(map(write_count, self.sources()))

    def rewritten_by_forward(self) -> frozenset[int]:
        """Numbers of the sources that the wrapper may write at any forward pass, with the values of another rank."""
        return frozenset()

    @abstractmethod
    def _read_specs(self) -> list[TensorSpec]:
        """See :meth:`specs`."""

    @abstractmethod
    def _read_sources(self) -> list[Tensor]:
        """See :meth:`sources`."""

    @abstractmethod
    def _read_spec(self, number: int) -> TensorSpec:
        """See :meth:`describe`."""

    def _removed(self, number: int) -> TensorSpec:
        """Returns the spec of an ignored tensor that was removed, until ``specs()`` is called again. Local."""
        return replace(self._announced[number], shape=torch.Size([0]), runs=())

    @abstractmethod
    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        """See :meth:`trained`."""

    def _follow(self, binding: Binding, numbers: Sequence[int] | None = None) -> None:
        """Takes over which tensors a binding found to be resized or removed. Local.

        ``numbers`` are those of the binding's slots among the specs; None means that they are the same.
        """
        if binding.outdated:
            self.outdated = True
        if binding.resized:
            found = [slot if numbers is None else numbers[slot] for slot in sorted(binding.resized)]
            binding.resized.clear()
            self._resized |= frozenset(found)
            for number in found:
                self.describe(number)

    def _check_first(self, sources: Sequence[Tensor]) -> None:
        """Raises EMAError for what can only come about between ``specs()`` and the first use of ``sources()``. Local.

        That the model was sharded in that time, for one. Later it would replace parameters, which is noticed anyway.
        """
        return

    def _misfit(self, sources: Sequence[Tensor]) -> EMAStateError:
        """Describes the first source whose number of elements differs from its spec."""
        for spec, size, source in zip(self._announced, self._sizes, sources, strict=False):
            if source.numel() != size:
                return EMAStateError(
                    f"{spec.name!r} has {source.numel()} elements on this rank, and had {size} when the average was "
                    "made: it was sharded, gathered or resized since. Make the average after the model is sharded, or "
                    "call reset()"
                )
        return EMAStateError(f"the model has {len(sources)} tensors and not {len(self._sizes)}. Call reset()")

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """Returns the modules whose forward pass computes with the weights. Local."""

    @property
    def is_part(self) -> bool:
        """Returns whether other ranks may have tensors of other names: pipeline stages, experts. Local."""
        return False

    def ranks(self) -> frozenset[int]:
        """Global ranks over which the wrapper spreads the weights; empty where it knows of no other rank. Local."""
        return frozenset()

    def check_layout(self) -> None:
        """Compares the elements of each spec with those that the wrapper gives to this rank. Local; reads no weight.

        Raises EMAEngineError, naming a tensor that the library would read in another order than the wrapper.
        """
        return

    def layout(self, name: str) -> str:
        """Describes how this rank holds a tensor, for errors; "" for one that it does not have. Local."""
        for spec in self._announced:
            if spec.name == name:
                runs = ", ".join(map(str, spec.runs[:3])) + (", ..." if len(spec.runs) > 3 else "")
                return f"{spec.local_numel} elements of shape {tuple(spec.shape)} in runs {runs or 'of none'}"
        return ""

    def stepped(self) -> bool:
        """False if the optimizer was not stepped since the last call that returned True. Local."""
        return True

    def reshard(self) -> None:
        """Drops full copies that a forward pass left behind, so that the sources are what counts. Local."""
        return

    def caches(self) -> list[CachedScale]:
        """Returns what live tensors compute from their elements ahead of a forward pass, to be dropped where others
        write these. Local; no host sync.
        """
        return []

    def publish(self) -> None:
        """Makes the live model compute with what the sources hold. Collective where the layout needs it."""
        return

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        """Keeps forward passes in the block from overwriting this rank's buffers with another rank's. Local."""
        yield

    def attach(self, optimizer: object, callback: Callable[[], object]) -> RemovableHandle:
        """Calls ``callback`` after every real step of ``optimizer``, which may be wrapped. Local."""
        inner = unwrap_optimizer(optimizer)
        if inner is None:
            raise EMAConfigError(
                f"attach(optimizer={type(optimizer).__name__}): pass the torch.optim.Optimizer that steps the model, "
                "or a wrapper that has it as .optimizer (of several optimizers, the one that steps last)"
            )

        self._warn_of_another_model(inner)
        if is_other_wrapper(optimizer, inner):
            return OuterStep(optimizer, inner, callback)

        @untraced
        def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
            if is_training_step(stepped):
                callback()

        return inner.register_step_post_hook(after_step)

    def _warn_of_another_model(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs if none of what the optimizer steps is a parameter of the model (it may hold masters of them). Local."""
        self.reshard()
        own = {id(parameter) for module in self.modules() for parameter in module.parameters()}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if own and stepped and own.isdisjoint(stepped):
            logger.warning(
                "attach(): the %s steps no parameter of the averaged model. If it is another model's optimizer, the "
                "average counts that one's steps.",
                type(optimizer).__name__,
            )

    def warn_of_lacking(self, optimizer: object, averaged: Container[str], known: Container[str]) -> None:
        """Logs if the optimizer steps only some of the averaged parameters. Local.

        Args:
            optimizer: as for :meth:`attach`.
            averaged: canonical names of what is averaged.
            known: canonical names of all tensors. A parameter of another name is one of the wrapper's own, such as a
                flat parameter of FSDP, and counts as averaged.
        """
        inner = unwrap_optimizer(optimizer)
        if inner is None:
            return
        stepped = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        lacking: dict[int, str] = {}
        own: set[int] = set()
        for module in self.modules():
            for prefix, owner in walk_modules(module):
                for key, parameter in owner._parameters.items():
                    if parameter is None or not parameter.requires_grad:
                        continue
                    own.add(id(parameter))
                    name = f"{prefix}.{key}" if prefix else key
                    if id(parameter) not in stepped and (name in averaged or name not in known):
                        lacking.setdefault(id(parameter), name)
        if lacking and not own.isdisjoint(stepped):  # else the optimizer has masters, or is another model's
            names = ", ".join(map(repr, list(lacking.values())[:4])) + (", ..." if len(lacking) > 4 else "")
            logger.warning(
                "attach(): the %s does not have %d of the averaged parameters (%s). If another optimizer steps them, "
                "attach the optimizer that steps last; otherwise the average takes them one step late.",
                type(inner).__name__,
                len(lacking),
                names,
            )
