"""Defines the engine: the interface between the averages and one way of sharding a model.

An engine tells which elements of which tensor this rank holds, and gives access to them. This file has the interface,
and the checks that are the same for all engines. ``engines/__init__.py`` chooses the engine of a model.

Two kinds of tensor:

- *source*: the tensor that is averaged. It is the live parameter's local shard, or its slice of the fp32 master weights
  where the engine has masters (DeepSpeed). Always a plain ``torch.Tensor``, never a ``DTensor``.
- *live tensor*: the tensor that the model computes with. It is the same memory as the source, or
  :meth:`Engine.publish` makes it from the source.

Call order, for one average:

1. ``specs()``: at construction and at ``reset()``. Every rank, local. Returns names, shapes and runs. Weights may still
   be on the meta device. Full copies that a forward pass left behind are dropped first.
2. ``stepped()``: at each ``update()``. Every rank, local. Returns whether there was a real optimizer step.
3. ``reshard()``, then ``sources()``: at each update that is due, and before any other read or write of the weights.
   Every rank, local. Afterwards ``outdated`` and ``resized()`` tell which allowed changes there were, and ``trained()``
   which parameters are trained now.
4. ``publish()``: after writes to the sources. Every rank, collective where the layout needs it. Afterwards the next
   forward computes with the values of the sources.
5. ``attach()``: if the user asks for it. Every rank, local.

An engine implements ``_read_specs()``, ``_read_sources()``, ``_read_spec()`` and ``_trained_of()``. For every engine,
``sources()`` checks that each source has as many elements as its spec announced, so that no kernel reads out of bounds.
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

#: Runs and names that a message lists; it shortens the rest.
_SHOWN_RUNS = 3
_SHOWN_NAMES = 4


class RemovableHandle(Protocol):
    """A handle with which a hook can be removed, as :meth:`ShardedEMA.attach` returns it."""

    def remove(self) -> None: ...


class Attached:
    """A handle that calls ``removed`` when it has removed the hook of an inner handle."""

    def __init__(self, inner: RemovableHandle, removed: Callable[[], None]) -> None:
        self._inner = inner
        self._removed = removed

    def remove(self) -> None:
        """Stops the updates. Local."""
        self._inner.remove()
        self._removed()


def write_count(tensor: Tensor) -> int:
    """Returns torch's counter of in-place writes to a tensor and its views; 0 for an inference tensor, without one."""
    return 0 if tensor.is_inference() else tensor._version


class Engine(ABC):
    """One way of sharding a model. Only subclasses access private attributes of a wrapper."""

    #: Ranks that take part in collective calls; None in a run without a process group.
    group: dist.ProcessGroup | None = None
    #: Whether :meth:`publish` is a collective call, of all ranks of ``group``.
    publish_is_collective: bool = False
    #: Whether ignored tensors were added or removed since ``specs()``, so that it has to be called again.
    outdated: bool = False

    _announced: list[TensorSpec]  # of the last specs(), with later changes of shapes
    _sizes: list[int]  # the number of elements that each source must have, one for each announced spec
    _resized: frozenset[int] = frozenset()  # numbers of specs whose shape has changed since resized() was called
    _used = False  # whether sources() has returned tensors with memory (not on the meta device) since specs()
    _ignored: Ignored = staticmethod(ignore_nothing)

    def ignore(self, ignored: Ignored) -> None:
        """Sets which tensors are in no average. Local; takes effect at the next ``specs()``.

        Ignored tensors may be added, removed, replaced and resized at any time. ``ignored`` gets the canonical name of
        a tensor, and whether it is a buffer.
        """
        self._ignored = ignored

    def specs(self) -> list[TensorSpec]:
        """Returns every parameter and persistent buffer once, in the order of the plain model's ``state_dict()``.
        Local.
        """
        specs = list(self._read_specs())
        self._announced = specs
        self._sizes = [spec.local_numel for spec in specs]
        self._used = False
        self._resized = frozenset()
        self.outdated = False
        return specs

    def announced(self) -> list[TensorSpec]:
        """Returns the specs of the last ``specs()`` call, with the present shapes of resized tensors. Local."""
        return list(self._announced)

    def resized(self) -> bool:
        """Returns whether a buffer or an ignored tensor has changed its shape since the last call. Local."""
        is_resized = bool(self._resized)
        self._resized = frozenset()
        return is_resized

    def trained(self, numbers: Sequence[int]) -> list[int]:
        """Returns which of these parameters are trained now. Local; to be called after ``sources()``.

        A parameter is trained if it has ``requires_grad``. Under DeepSpeed the groups of the optimizer decide.

        Args:
            numbers: positions of the parameters in ``specs()``.
        """
        # Otherwise each read of a DTensor's attribute would go through its __torch_function__, which costs more.
        with torch._C.DisableTorchFunctionSubclass():
            return self._trained_of(numbers)

    def describe(self, number: int) -> TensorSpec:
        """Returns the spec of one tensor as it is now, and announces this spec from now on. Local."""
        spec = self._read_spec(number)
        self._announced[number] = spec
        self._sizes[number] = spec.local_numel
        return spec

    def replace_buffer(self, old: Tensor, new: Tensor) -> None:
        """Puts ``new`` into every place of the model that holds the buffer ``old``. Local.

        Used for a buffer that gets a value of another shape. Raises EMAStateError if no place holds ``old``.
        """
        places: list[tuple[nn.Module, str]] = []
        for root in self.modules():
            for module in root.modules():
                places += [(module, key) for key, buffer in module._buffers.items() if buffer is old]
        for module, key in places:
            module._buffers[key] = new
        if not places:
            raise EMAStateError(
                f"a buffer of shape {tuple(old.shape)} cannot take a value of shape {tuple(new.shape)}, because it is "
                "sharded: give buffers='ignore', or exclude= with its name"
            )

    def sources(self) -> list[Tensor]:
        """Returns the source of every tensor, in the order of the last ``specs()`` call. Local; no copy, no host sync.

        Flattened row-major, a source has the elements of its spec's runs, in the order of the runs. A write to the
        sources, followed by :meth:`publish`, changes the live model.

        Changes since ``specs()``:

        - A parameter was added, removed, replaced or sharded in another way: raises EMAStateError, which names it.
        - A buffer has another shape: ``announced()`` has the new one.
        - An ignored tensor was removed: its source is empty. Other changes of ignored tensors are not noticed.
        """
        sources = self._read_sources()
        if list(map(Tensor.numel, sources)) != self._sizes:  # without a Python loop: 35 us for a thousand tensors
            raise self._misfit(sources)
        if not self._used:
            self._check_first(sources)
            # A model on the meta device may still be sharded before its weights get memory. Then check again.
            self._used = not any(source.is_meta for source in sources)
        return sources

    def write_counts(self) -> list[int]:
        """Returns a counter of the writes to each source, in the order of ``sources()``. Local; no host sync.

        If it differs between two calls, the source was written. Writes through ``.data`` are not counted.
        """
        return list(map(write_count, self.sources()))

    def rewritten_by_forward(self) -> frozenset[int]:
        """Returns the numbers of the sources that a forward pass may overwrite with another rank's values. Local."""
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
        """Takes over from a binding which tensors were resized or removed. Local.

        Args:
            binding: after its ``check()``.
            numbers: the number among the specs of each slot of the binding; None if slots and specs are the same list.
        """
        if binding.outdated:
            self.outdated = True
        if binding.resized:
            resized = [slot if numbers is None else numbers[slot] for slot in sorted(binding.resized)]
            binding.resized.clear()
            self._resized |= frozenset(resized)
            # The size that sources() compares is the new one from now on.
            for number in resized:
                self.describe(number)

    def _check_first(self, sources: Sequence[Tensor]) -> None:
        """Raises EMAError if the model was sharded between ``specs()`` and the first use of ``sources()``. Local.

        Later it need not be checked: to shard a model replaces its parameters, which the binding notices.
        """
        return

    def _misfit(self, sources: Sequence[Tensor]) -> EMAStateError:
        """Returns the error that names the first source whose number of elements differs from its spec."""
        for spec, size, source in zip(self._announced, self._sizes, sources, strict=False):
            if source.numel() != size:
                return EMAStateError(
                    f"{spec.name!r} has {source.numel()} elements on this rank, and had {size} when the average was "
                    "made: it was sharded, gathered or resized since. Make the average after the model is sharded, or "
                    "call reset()"
                )
        return EMAStateError(
            f"the model has {len(sources)} tensors, and had {len(self._sizes)} when the average was made. Call reset()"
        )

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """Returns the modules whose forward pass computes with the weights. Local."""

    @property
    def is_part(self) -> bool:
        """Returns whether other ranks may have tensors with other names: pipeline stages, experts. Local."""
        return False

    def ranks(self) -> frozenset[int]:
        """Returns the global ranks over which the wrapper spreads the weights; empty for a plain module. Local."""
        return frozenset()

    def check_layout(self) -> None:
        """Compares the runs of each spec with the elements that the wrapper puts on this rank. Local; reads no weight.

        Raises EMAEngineError, naming the first tensor that differs.
        """
        return

    def layout(self, name: str) -> str:
        """Describes in words how this rank holds a tensor, for errors; "" if it does not have the tensor. Local."""
        for spec in self._announced:
            if spec.name == name:
                runs = ", ".join(map(str, spec.runs[:_SHOWN_RUNS])) + (", ..." if len(spec.runs) > _SHOWN_RUNS else "")
                return f"{spec.local_numel} elements of shape {tuple(spec.shape)} in runs {runs or 'of none'}"
        return ""

    def stepped(self) -> bool:
        """Returns False if the optimizer has made no real step since the last call that returned True. Local."""
        return True

    def reshard(self) -> None:
        """Drops full copies that a forward pass left behind, so that the next one reads the sources. Local."""
        return

    def caches(self) -> list[CachedScale]:
        """Returns the scales that live tensors have computed ahead from their elements. Local; no host sync.

        They have to be dropped when the elements are written.
        """
        return []

    def publish(self) -> None:
        """Makes the live model compute with the values of the sources. Collective where the layout needs it."""
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
        # A wrapper such as Lookahead changes the weights after the inner step, so the callback has to come after both.
        if is_other_wrapper(optimizer, inner):
            return OuterStep(optimizer, inner, callback)

        @untraced
        def after_step(stepped: torch.optim.Optimizer, *_: object) -> None:
            if is_training_step(stepped):
                callback()

        return inner.register_step_post_hook(after_step)

    def _warn_of_another_model(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs a warning if the optimizer steps no parameter of the model. Local.

        Not an error, because the optimizer may step masters of the parameters.
        """
        self.reshard()
        own = {id(parameter) for module in self.modules() for parameter in module.parameters()}
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if own and stepped and own.isdisjoint(stepped):
            logger.warning(
                "attach(): the %s steps no parameter of the averaged model. If it is another model's optimizer, the "
                "average counts the steps of that model: attach the optimizer of the averaged model.",
                type(optimizer).__name__,
            )

    def warn_of_lacking(self, optimizer: object, averaged: Container[str], known: Container[str]) -> None:
        """Logs a warning if the optimizer steps only some of the averaged parameters. Local.

        Args:
            optimizer: as for :meth:`attach`.
            averaged: canonical names of the averaged tensors.
            known: canonical names of all tensors. A parameter with another name belongs to the wrapper, such as a flat
                parameter of FSDP1, and counts as averaged.
        """
        inner = unwrap_optimizer(optimizer)
        if inner is None:
            return
        stepped = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        lacking: dict[int, str] = {}  # names by id, so that tied parameters are listed once
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
        # If the optimizer steps no parameter at all, it has masters or belongs to another model.
        if lacking and not own.isdisjoint(stepped):
            names = ", ".join(map(repr, list(lacking.values())[:_SHOWN_NAMES]))
            if len(lacking) > _SHOWN_NAMES:
                names += ", ..."
            logger.warning(
                "attach(): the %s does not step %d of the averaged parameters (%s). If another optimizer steps them, "
                "attach the optimizer that steps last; otherwise the average takes them one step late.",
                type(inner).__name__,
                len(lacking),
                names,
            )
