"""Handles a second model: a teacher (``ShardedEMA(into=)``), or the target of ``copy_to(into=)``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.comm.catalogue import FullTensor
from dist_ema.engines import detect_in
from dist_ema.engines.base import Engine
from dist_ema.engines.counterpart import Counterpart
from dist_ema.engines.names import walk_modules
from dist_ema.engines.wrappers import unwrap_optimizer
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.options import Options
from dist_ema.shadow.device import Shadow
from dist_ema.teacher.gathered import GatheredTeacherShadow
from dist_ema.teacher.shadow import TeacherShadow

#: The teacher object that writes each tensor of each module, by key. There is one map for the process.
_fillers: WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Teacher]]] = WeakKeyDictionary()
OPTION = "the teacher (into=)"


class Teacher:
    """Describes the model into which one ``ShardedEMA`` averages.

    Args:
        target: the model that is averaged.
        into: the teacher.
        options: the options of the average, among them ``rename`` and ``sync``.
        group: the process group of both models.

    Raises:
        EMAConfigError: the teacher is the averaged model.

    Attributes:
        target: the model that is averaged; another wrapping of it after a ``rebind()``.
    """

    def __init__(self, target: object, into: object, options: Options, group: object) -> None:
        if into is target and not options.rename:
            raise EMAConfigError("into= is the model that is averaged: pass a second one, such as a deep copy of it")
        self.target = target
        self._into = into
        self._options = options
        self._group = group
        self._shares: Sequence[Share] = ()
        self._counterpart: Counterpart | None = None
        self._claimed = False

    def match(self, shares: Sequence[Share], target: object) -> Counterpart:
        """Returns the teacher's tensors in the order of these shares of ``target``. Local.

        Raises:
            EMAEngineError: the teacher has other names or another sharding, or is trained, or shares memory with the
                averaged model.
        """
        if self._counterpart is None or self._shares is not shares:
            # This makes new engines: weights may have been loaded or replaced since the existing ones were made.
            self._refuse_shared_memory(shares, target)
            counterpart = self._make_counterpart(shares)
            for share, spec in zip(shares, counterpart.specs_of, strict=True):
                if spec is not None and spec.kind == "parameter":
                    raise EMAEngineError(
                        f"{OPTION} is trained: its parameter {spec.name!r} requires a gradient, and the next average "
                        f"of {share.spec.name!r} would undo what an optimizer writes. Call requires_grad_(False) on it"
                    )
            self.release()
            self._shares, self._counterpart = shares, counterpart
            self.claim()
        return self._counterpart

    def _make_counterpart(self, shares: Sequence[Share]) -> Counterpart:
        engine = detect_in(self._into, self._group, trains=False)
        return Counterpart(engine, shares, self._options.renamed, OPTION, alike=self._options.sync is None)

    def _refuse_shared_memory(self, shares: Sequence[Share], target: object) -> None:
        student = detect_in(target, self._group)
        student.specs()
        refuse_shared_memory(student, self._make_counterpart(shares), shares, OPTION)

    def shadow(
        self,
        names: Iterable[str],
        shares: Sequence[Share],
        skip_nonfinite: bool,
        seed: int | None,
        group: dist.ProcessGroup | None,
        prove: Callable[[Sequence[Share]], list[FullTensor]],
        target: object = None,
    ) -> Shadow:
        """Returns a new average, which has memory of its own until it is installed. Local. Raises as :meth:`match`.

        Args:
            names, shares, skip_nonfinite, seed: as for :class:`~dist_ema.shadow.device.Shadow`.
            group: the ranks that hold the model.
            prove: lists all full tensors after a proof of the layout; see :class:`GatheredTeacherShadow`.
            target: the model of the shares; None means the averaged model.
        """
        found = self.match(shares, self.target if target is None else target)
        given = names, shares, skip_nonfinite, seed, found, self.claim, self.release
        if self._options.sync is None:
            return TeacherShadow(*given)
        return GatheredTeacherShadow(*given, group, prove)

    def check_optimizer(self, optimizer: object) -> None:
        """Raises EMAConfigError if an optimizer steps a parameter of the teacher. Local."""
        inner = unwrap_optimizer(optimizer) or getattr(optimizer, "optimizer", None) or optimizer
        groups = getattr(inner, "param_groups", ())
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        for module, key in self._places():
            if id(module._parameters.get(key)) in stepped:
                raise EMAConfigError(
                    f"attach(): the {type(inner).__name__} also has {key!r} of {OPTION}, a {type(module).__name__}: "
                    "give it the parameters of the averaged model only"
                )

    def claim(self) -> None:
        """Registers this average as the one that writes the teacher. Local.

        Raises:
            EMAStateError: another average writes it.
        """
        if self._claimed:
            return
        places = list(self._places())
        if (other := _other_filler(places, self)) is not None:
            module, key = other
            raise EMAStateError(
                f"another ShardedEMA already averages into {key!r} of {OPTION}, a {type(module).__name__}, and a "
                "teacher can have only one average. Call close() on the other one first"
            )
        for module, key in places:
            _fillers.setdefault(module, {})[key] = weakref.ref(self)
        self._claimed = True

    def release(self) -> None:
        """Lets another average write the teacher. This one claims it again at its next write. Local."""
        for module, key in self._places():
            known = _fillers.get(module, {})
            if (found := known.get(key)) is not None and found() is self:
                del known[key]
        self._claimed = False

    def _places(self) -> Iterator[tuple[nn.Module, str]]:
        """Yields each module with the key of a tensor in it that the average writes."""
        return iter(()) if self._counterpart is None else _places(self._counterpart)


def _places(counterpart: Counterpart) -> Iterator[tuple[nn.Module, str]]:
    """Yields each module with the key of a tensor in it that corresponds to an averaged one."""
    filled = {name for spec in counterpart.specs_of if spec is not None for name in (spec.name, *spec.aliases)}
    for root in counterpart.modules():
        for prefix, module in walk_modules(root):
            for key in (*module._parameters, *module._buffers):
                if (f"{prefix}.{key}" if prefix else key) in filled:
                    yield module, key


def _other_filler(places: Iterable[tuple[nn.Module, str]], own: Teacher | None) -> tuple[nn.Module, str] | None:
    """Returns the first module and key that another average writes; None if there is none."""
    for module, key in places:
        known = _fillers.get(module, {}).get(key)
        other = None if known is None else known()
        if other is not None and other is not own:
            return module, key
    return None


def counterpart(
    engine: Engine, into: object, shares: Sequence[Share], options: Options, group: object, own: Teacher | None
) -> Counterpart:
    """Returns the tensors of a model into which an average is copied once. Local.

    Args:
        engine: the engine of the averaged model.
        into: the model to copy into.
        shares: what this rank averages of each tensor.
        options: the options of the average, among them ``rename``.
        group: the process group of both models.
        own: the teacher of this average, if it has one.

    Raises:
        EMAEngineError: ``into`` does not fit, or shares memory with the averaged model.
        EMAStateError: ``into`` is the teacher of another average.
    """
    option = "the model to copy into (into=)"
    other = Counterpart(detect_in(into, group, trains=False), shares, options.renamed, option)
    refuse_shared_memory(engine, other, shares, option)
    if (place := _other_filler(_places(other), own)) is not None:
        module, key = place
        raise EMAStateError(
            f"copy_to(into=...): another ShardedEMA averages into {key!r} of this model, a {type(module).__name__}, "
            "so copying would overwrite that average. Call close() on it first, or copy into another model"
        )
    return other


def refuse_shared_memory(student: Engine, other: Counterpart, shares: Sequence[Share], option: str) -> None:
    """Raises EMAEngineError if both models have a tensor in the same memory. Local."""
    student.reshard()
    other.reshard()
    taken: dict[tuple[torch.device, int], str] = {}
    for share, source in zip(shares, student.sources(), strict=True):
        if source.numel() and not source.is_meta and share.mode != "live":
            taken[source.device, source.data_ptr()] = share.spec.name
    for share, tensor in zip(shares, other.sources(), strict=True):
        name = taken.get((tensor.device, tensor.data_ptr())) if tensor.numel() and not tensor.is_meta else None
        if name is not None:
            raise EMAEngineError(
                f"{option} shares the memory of {share.spec.name!r} with {name!r} of the averaged model, so it would "
                "change with every step. Give it weights of its own, for example by copy.deepcopy()"
            )
